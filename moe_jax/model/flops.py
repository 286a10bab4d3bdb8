"""Parameter counts and model FLOPs per token, from the abstract parameters.

L layers, T positions per row, H query heads, A head width, E experts, K assignments per token.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax

from moe_jax.model.define import ModelDef, is_axes


class ParamCounts(NamedTuple):
    """Parameter counts of a model."""

    total: int
    active: int  # used by one token


def param_counts(model: ModelDef) -> ParamCounts:
    """Count the parameters of a model; allocates nothing.

    Active parameters are all parameters outside the routed experts (including the whole embedding
    table, as in published figures) and K of the E routed experts of each layer.
    """
    leaves = list(_leaves(model))
    total = sum(size for _, _, size in leaves)
    return ParamCounts(total, sum(_used(model, axes, size) for _, axes, size in leaves))


def active_outside_vocabulary(model: ModelDef) -> int:
    """Count the active parameters outside the embedding table and the output head.

    It allocates nothing.

    Args:
      model: the definition of the model.

    Returns:
      `param_counts(model).active` less the parameters with an axis over the vocabulary: N of laws
      that leave out embeddings.

    Reference: Kaplan et al., arXiv 2001.08361, section 2.1.
    """
    return sum(_used(model, axes, size) for _, axes, size in _leaves(model) if "vocab" not in axes)


def flops_per_token(model: ModelDef, length: int) -> float:
    """Compute the model FLOPs per token, forward and backward, in rows of `length` tokens.

    Each active parameter of a matmul counts 6 (2 forward, 4 backward); this includes the head but
    not the embedding lookup or norm weights.  Attention counts 6 L T H A: two matmuls of 2 T H A
    forward, three times that with the backward pass, halved by the causal mask.  Router, shared
    experts and head count; recomputation, padding rows and the optimizer do not (the convention of
    PaLM, arXiv 2204.02311, appendix B, with causal attention halved).
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
    """Yield (last name, logical axes without `layers`, size) of every parameter."""
    axes_of = dict(jax.tree.leaves_with_path(model.logical_axes, is_leaf=is_axes))
    for path, leaf in jax.tree.leaves_with_path(model.abstract):
        axes = tuple(axis for axis in axes_of[path] if axis != "layers")
        yield path[-1].key, axes, math.prod(leaf.shape)


def _used(model: ModelDef, axes: tuple[str | None, ...], size: int) -> int:
    """The number of elements of a parameter that one token uses."""
    if model.components is None or "experts" not in axes:
        return size
    return size // model.config.moe.num_experts * model.components.router.choices_per_token
