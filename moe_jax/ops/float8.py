"""The grouped matmul with float8 operands, twice as fast in the forward pass and input gradient.

Axes: N rows, E groups (experts), D input width, F output width, as in grouped_matmul.py; in helpers
K is the contracted width and M the other.

Each row of `x`, or of `dy`, is scaled by its largest absolute value, and each expert's matrix by
its own, so that both use the range of e4m3 (4 bits of exponent, 3 of mantissa, up to 448;
https://arxiv.org/abs/2209.05433).  Products are summed in float32; the sums are rounded to the
dtype of `x`, multiplied by the scales in float32, and rounded to it again.  The weight gradient
sums over thousands of rows and goes into the optimizer, so it is that of grouped_matmul, from
unrounded operands.

On a Hopper GPU the kernels of moe_jax/ops/mosaic multiply.  Elsewhere the rounded operands are cast
back and multiplied by grouped_matmul: the results are equal up to rounding, without the gain in
speed.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_jax.ops.grouped_matmul import grouped_matmul, weight_gradient
from moe_jax.ops.mosaic import choose
from moe_jax.parallel.collectives import varying_like

DTYPE = jnp.float8_e4m3fn
LARGEST = 448.0  # largest finite e4m3 number
_TINY = 1e-30  # keeps the scale of a row of zeros above 0


@jax.custom_vjp
def float8_grouped_matmul(
    x_ND: Float[Array, "N D"], w_EDF: Float[Array, "E D F"], sizes_E: Int[Array, "E"]
) -> Float[Array, "N F"]:
    """The grouped matmul y[n] = x[n] @ w[group of n], with both operands rounded to float8.

    Args:
      x_ND: rows, sorted by group.
      w_EDF: one matrix per group.
      sizes_E: rows per group, int32; rows >= their sum are padding, unspecified in the output.

    Returns:
      [N, F] in the dtype of x.

    Reference: FP8 formats, arXiv 2209.05433.
    """
    return _save(x_ND, w_EDF, sizes_E)[0]


def _save(x_ND, w_EDF, sizes_E):
    w8_EDF, scale_E = round_experts(w_EDF)
    y_NF = _product(x_ND, w_EDF, w8_EDF.swapaxes(1, 2), scale_E, sizes_E)
    return y_NF, (x_ND, w_EDF, w8_EDF, scale_E, sizes_E)


def _backward(saved, dy_NF):
    x_ND, w_EDF, w8_EDF, scale_E, sizes_E = saved
    dx_ND = _product(dy_NF, w_EDF.swapaxes(1, 2), w8_EDF, scale_E, sizes_E)
    dw_EDF = weight_gradient(x_ND, w_EDF, dy_NF, sizes_E)
    return dx_ND, dw_EDF, np.zeros(sizes_E.shape, jax.dtypes.float0)


float8_grouped_matmul.defvjp(_save, _backward)


def round_rows(x_ND: Float[Array, "N D"]) -> tuple[Float[Array, "N D"], Float[Array, "N 1"]]:
    """Round x to float8 numbers and float32 scales, one per row, whose product is about x."""
    return _round(x_ND, 1)


def round_experts(w_EDF: Float[Array, "E D F"]) -> tuple[Float[Array, "E D F"], Float[Array, "E"]]:
    """Round w to float8 numbers and float32 scales, one per expert, whose product is about w."""
    w8_EDF, scale_E11 = _round(w_EDF, (1, 2))
    return w8_EDF, scale_E11.reshape(-1)


def _round(x, axes):
    highest = jnp.abs(x).max(axes, keepdims=True).astype(jnp.float32)
    scale = jnp.maximum(highest, _TINY) / LARGEST
    return (x.astype(jnp.float32) / scale).astype(DTYPE), scale


def _product(x_NK, w_EKM, w8_EMK, scale_E, sizes_E):
    """Multiply x, rounded here, by the rounded matrices (contraction last); w_EKM gives a shape."""
    x8_NK, scale_N1 = round_rows(x_NK)
    y_NM = product(x_NK, w_EKM)(x8_NK, w8_EMK, sizes_E)
    # The scales are applied one after the other, because their product may underflow float32.
    scaled_NM = y_NM.astype(jnp.float32) * scale_N1
    groups_N = _groups(sizes_E, x_NK.shape[0])
    return (scaled_NM * scale_E[groups_N][:, None]).astype(x_NK.dtype)


def product(x_NK: Float[Array, "N K"], w_EKM: Float[Array, "E K M"]) -> Callable[..., jax.Array]:
    """The function that multiplies rounded operands, by kernel if it supports these shapes.

    It maps (rounded rows [N, K], rounded matrices [E, M, K], sizes) to [N, M] in the dtype of
    `x_NK`.  Only shape and dtype of the arguments are read.
    """
    plain = functools.partial(_plain, x_NK.dtype)
    kernel = _kernel if choose.supports(x_NK, w_EKM) else plain

    def run(x8_NK, w8_EMK, sizes_E):
        return jax.lax.platform_dependent(x8_NK, w8_EMK, sizes_E, cuda=kernel, default=plain)

    return run


def _groups(sizes_E, rows: int):
    """The group of each row; for padding rows the last group."""
    ends_E = jnp.cumsum(sizes_E)[:-1]
    return (jnp.arange(rows)[:, None] >= ends_E).sum(1, dtype=jnp.int32)


def _plain(dtype, x8_NK, w8_EMK, sizes_E):
    return grouped_matmul(x8_NK.astype(dtype), w8_EMK.swapaxes(1, 2).astype(dtype), sizes_E)


def _kernel(x8_NK, w8_EMK, sizes_E):
    from moe_jax.ops.mosaic.product import grouped_product

    return varying_like(grouped_product(x8_NK, w8_EMK, sizes_E, transpose=True), x8_NK)
