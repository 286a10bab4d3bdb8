"""RMSNorm over the last axis, D."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_jax.nn.params import ones, param, param_dtype


def rms_norm(
    x: Float[Array, "*axes D"], weight_D: Float[Array, "D"], eps: float
) -> Float[Array, "*axes D"]:
    """The product x / rms(x) * weight over the last axis (https://arxiv.org/abs/1910.07467).

    The statistics are float32 (float64 for float64); the product with the weight is in x's dtype,
    as in Hugging Face's Llama family.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * weight_D.astype(x.dtype)


class RMSNorm(nnx.Module):
    """A layer that applies `rms_norm` with its own weight."""

    def __init__(
        self, size: int, logical_axis: str, *, eps: float, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.eps = eps
        own = param_dtype(dtype)
        self.weight = param(rngs, "weight", (size,), (logical_axis,), ones, own, group="norm")

    def __call__(self, x: Float[Array, "*axes D"]) -> Float[Array, "*axes D"]:
        return rms_norm(x, self.weight[...], self.eps)
