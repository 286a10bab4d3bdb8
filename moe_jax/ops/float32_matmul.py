"""A matmul of activations with a float32 matrix in full float32 precision, for routers.

The default float32 matmul is TF32 on Hopper and bfloat16 on TPU, and `Precision.HIGHEST` does not
use the matrix units of a GPU.  But a float32 number is the sum of three bfloat16 numbers (24 bits
of mantissa, 8 each), and the product of two bfloat16 numbers is exact in float32.  If the
activations are bfloat16, the float32 matrix is therefore cut into three bfloat16 parts, and one
matmul on the matrix units, three times as wide, gives the same logits.  This is the BF16x3 of
"Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations" (arXiv
1904.06376), with only one side cut into parts.

Axes: D input width, E experts, the output width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def float32_matmul(x: Float[Array, "*batch D"], w_DE: Float[Array, "D E"]) -> Float[Array, "..."]:
    """The product x @ w in the wider dtype of the two, at least float32, in its full precision.

    Args:
      x: rows of width D, with any leading axes.
      w_DE: the matrix.

    Returns:
      [*batch, E].

    If w is cut into parts, devices exchange three times as many numbers for w and for its gradient:
    D * 3E, 1.5 MB for a width of 2048 and 64 experts.

    Reference: bfloat16 in three parts, arXiv 1904.06376.
    """
    if x.dtype == jnp.bfloat16 and w_DE.dtype == jnp.float32:
        return _mixed(x, w_DE)
    return plain(x, w_DE)


def plain(x: Float[Array, "*batch D"], w_DE: Float[Array, "D E"]) -> Float[Array, "..."]:
    """The reference: a matmul of both sides in the wider dtype."""
    dtype = jnp.promote_types(jnp.promote_types(x.dtype, w_DE.dtype), jnp.float32)
    return jnp.matmul(x.astype(dtype), w_DE.astype(dtype), precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def _mixed(x, w_DE):
    # A CPU has no matrix units for bfloat16, so the parts would take three times as long.
    return jax.lax.platform_dependent(x, w_DE, cpu=plain, default=in_parts)


def _forward(x, w_DE):
    return _mixed(x, w_DE), (x, w_DE)


def _backward(saved, dy):
    def by_autodiff(x, w_DE, dy):
        return jax.vjp(plain, x, w_DE)[1](dy)

    return jax.lax.platform_dependent(*saved, dy, cpu=by_autodiff, default=gradients_in_parts)


_mixed.defvjp(_forward, _backward)


def parts(a: Float[Array, "..."]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Three bfloat16 arrays whose sum is the float32 `a`, the largest first.

    The sum is exact for 1e-20 < |a| < 3.38e38, the largest bfloat16.  Larger numbers give NaN; for
    smaller ones the smallest part is rounded to 0.  `reduce_precision` is used because XLA may drop
    a cast to bfloat16 and back.
    """
    high = jax.lax.reduce_precision(a, 8, 7)
    rest = a - high
    middle = jax.lax.reduce_precision(rest, 8, 7)
    low = rest - middle
    narrow = jnp.bfloat16
    return high.astype(narrow), middle.astype(narrow), low.astype(narrow)


def in_parts(x, w_DE):
    """Compute x @ w as one matmul with the parts of w side by side."""
    high, middle, low = _split(_matmul(x, jnp.concatenate(parts(w_DE), 1)))
    return low + middle + high  # smallest first, for the least rounding error


def gradients_in_parts(x, w_DE, dy):
    """The gradients: dx in bfloat16, dw in float32."""
    w_high, w_middle, w_low = parts(w_DE)
    dy_high, dy_middle, dy_low = parts(dy)
    # Three of the nine products are left out: they are below 2^-24 of the product of the high
    # parts.  The other six are needed, because a softmax's gradients cancel over E, so dx may be
    # far smaller than its terms.
    left = jnp.concatenate([dy_high, dy_high, dy_middle, dy_high, dy_middle, dy_low], -1)
    right = jnp.concatenate([w_high, w_middle, w_high, w_low, w_middle, w_high], 1)
    dx = _matmul(left, right.T)
    wide = jnp.concatenate([dy_high, dy_middle, dy_low], -1)
    batch = tuple(range(x.ndim - 1))
    dw = jax.lax.dot_general(x, wide, ((batch, batch), ((), ())), preferred_element_type="float32")
    high, middle, low = _split(dw)
    return dx.astype(x.dtype), low + middle + high


def _matmul(x, w):
    return jnp.matmul(x, w, preferred_element_type=jnp.float32)


def _split(wide):
    return jnp.split(wide, 3, axis=-1)
