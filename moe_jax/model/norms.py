"""RMSNorm."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moe_jax.model.params import ones, param, param_dtype


def rms_norm(
    x: Float[Array, "..."], weight: Float[Array, "..."], eps: float
) -> Float[Array, "..."]:
    """x / rms(x) * weight over the trailing dimensions that `weight` has.

    The statistics are float32 (float64 for float64); the product with `weight` is in x's dtype,
    as in Hugging Face's Llama family.  https://arxiv.org/abs/1910.07467
    """
    axes = tuple(range(x.ndim - weight.ndim, x.ndim))
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=axes, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * weight.astype(x.dtype)


class RMSNorm(nnx.Module):
    """`rms_norm` with a weight of its own; several dimensions are normalised together."""

    def __init__(
        self,
        shape: tuple[int, ...],
        logical_axes: tuple[str | None, ...],
        *,
        eps: float,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.eps = eps
        self.weight = param(rngs, "weight", shape, logical_axes, ones, param_dtype(dtype))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return rms_norm(x, self.weight[...], self.eps)
