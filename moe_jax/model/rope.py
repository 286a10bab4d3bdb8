"""Rotary position embedding (RoPE), half-split form.  https://arxiv.org/abs/2104.09864

B rows, T positions, H heads, A head width, P = A / 2 pairs.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


class Rope(NamedTuple):
    """The cosines and sines of the angles of every position, shared by all layers."""

    cos_BTP: Float[Array, "B T P"]  # P: pairs, half of the head width
    sin_BTP: Float[Array, "B T P"]


def rope_tables(
    positions_BT: Int[Array, "B T"], head_dim: int, theta: float, dtype: DTypeLike
) -> Rope:
    """Compute the tables of angles; angle i of position t is t * theta^(-2i / head_dim).

    Args:
      positions_BT: position of each token.
      head_dim: A.
      theta: base of the frequencies.
      dtype: compute dtype; the tables are in float32 or wider.

    Returns:
      Cosines and sines.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    exponents_a = jnp.arange(0, head_dim, 2, dtype=wide) / head_dim
    angles_BTP = positions_BT[..., None].astype(wide) * theta**-exponents_a
    return Rope(jnp.cos(angles_BTP), jnp.sin(angles_BTP))


def apply_rope(x_BTHA: Float[Array, "B T H A"], rope: Rope) -> Float[Array, "B T H A"]:
    """Rotate (x[i], x[i + A/2]) by angle i, in the tables' dtype; returns the dtype of x."""
    cos, sin = rope.cos_BTP[:, :, None], rope.sin_BTP[:, :, None]
    first, second = jnp.split(x_BTHA.astype(cos.dtype), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHA.dtype)
