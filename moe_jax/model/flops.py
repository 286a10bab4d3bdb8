"""What a model holds and what a token costs, from its abstract parameters."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.model.config import ModelConfig
from moe_jax.model.define import define, is_axes
from moe_jax.moe.components import make_router


class ParamCounts(NamedTuple):
    """Numbers of parameters."""

    total: int
    active: int  # those one token uses


def param_counts(config: ModelConfig) -> ParamCounts:
    """Counts of a model whose `vocab_size` is resolved; allocates nothing.

    Active are all parameters outside the routed experts (the whole embedding table included, as
    published figures count it) and K of every layer's E routed experts.
    """
    leaves = list(_leaves(config))
    total = sum(size for _, _, size in leaves)
    return ParamCounts(total, sum(_used(config, axes, size) for _, axes, size in leaves))


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Model FLOPs of forward and backward for one token of a row of `length` tokens.

    6 for each active parameter that is in a matrix product (2 forward, 4 backward; the head but
    not the embedding lookup, no norm weights), and 6 L T H A for attention: two products of
    2 T H A forward, three times that with backward, half of it under the causal mask.  Router,
    shared experts and head count; recomputation, padding of buffers and the optimizer do not
    (the convention of PaLM, arXiv 2204.02311, appendix B, with causal attention halved).
    """
    lookups = () if config.tied_head else ("embed_VD",)
    matmul = sum(
        _used(config, axes, size)
        for name, axes, size in _leaves(config)
        if name not in lookups and len(axes) >= 2
    )
    attention = config.num_layers * length * config.num_heads * config.head_dim
    return 6.0 * (matmul + attention)


def _leaves(config: ModelConfig) -> Iterator[tuple[str, tuple[str | None, ...], int]]:
    """(last name, logical axes without `layers`, size) of every parameter."""
    model = define(config, jnp.float32)
    axes_of = dict(jax.tree.leaves_with_path(model.logical_axes, is_leaf=is_axes))
    for path, leaf in jax.tree.leaves_with_path(model.abstract):
        axes = tuple(axis for axis in axes_of[path] if axis != "layers")
        yield path[-1].key, axes, math.prod(leaf.shape)


def _used(config: ModelConfig, axes: tuple[str | None, ...], size: int) -> int:
    """How many of a parameter's numbers one token uses."""
    if "experts" not in axes:
        return size
    return size // config.moe.num_experts * make_router(config.moe).choices
