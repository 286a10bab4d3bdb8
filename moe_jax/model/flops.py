"""What a model holds and what a token costs, from its abstract parameters."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax

from moe_jax.model.define import ModelDef, is_axes


class ParamCounts(NamedTuple):
    """Numbers of parameters."""

    total: int
    active: int  # those one token uses


def param_counts(model: ModelDef) -> ParamCounts:
    """Counts of a model; allocates nothing.

    Active are all parameters outside the routed experts (the whole embedding table included, as
    published figures count it) and K of every layer's E routed experts.
    """
    leaves = list(_leaves(model))
    total = sum(size for _, _, size in leaves)
    return ParamCounts(total, sum(_used(model, axes, size) for _, axes, size in leaves))


def flops_per_token(model: ModelDef, length: int) -> float:
    """Model FLOPs of forward and backward for one token of a row of `length` tokens.

    6 for each active parameter that is in a matrix product (2 forward, 4 backward; the head but
    not the embedding lookup, no norm weights), and 6 L T H A for attention: two products of
    2 T H A forward, three times that with backward, half of it under the causal mask.  Router,
    shared experts and head count; recomputation, padding of buffers and the optimizer do not
    (the convention of PaLM, arXiv 2204.02311, appendix B, with causal attention halved).
    """
    config = model.config
    lookups = () if config.tied_head else ("embed_VD",)
    matmul = sum(
        _used(model, axes, size)
        for name, axes, size in _leaves(model)
        if name not in lookups and len(axes) >= 2
    )
    attention = config.num_layers * length * config.num_heads * config.head_dim
    return 6.0 * (matmul + attention)


def _leaves(model: ModelDef) -> Iterator[tuple[str, tuple[str | None, ...], int]]:
    """(last name, logical axes without `layers`, size) of every parameter."""
    axes_of = dict(jax.tree.leaves_with_path(model.logical_axes, is_leaf=is_axes))
    for path, leaf in jax.tree.leaves_with_path(model.abstract):
        axes = tuple(axis for axis in axes_of[path] if axis != "layers")
        yield path[-1].key, axes, math.prod(leaf.shape)


def _used(model: ModelDef, axes: tuple[str | None, ...], size: int) -> int:
    """How many of a parameter's numbers one token uses."""
    if model.components is None or "experts" not in axes:
        return size
    return size // model.config.moe.num_experts * model.components.router.choices
