"""The grouped matmul: one matmul per group of consecutive rows, each with its own matrix.

Axes: N rows, E groups (experts), D input width, F output width.  Group e has the next sizes_E[e]
rows.  Rows past the last group are padding: unspecified in the output, and without effect on a
gradient.  The weight gradient of an empty group is zero.

IMPLEMENTATIONS lists the implementations of the three products: forward, input gradient and weight
gradient.  `jax.lax.ragged_dot` ("ragged") runs everywhere, but is a dense masked matmul on the CPU
backend (6 to 60 times the FLOPs) and far below the hardware's rate on GPUs.  On the CPU, a loop
over row tiles multiplies each tile by its group's matrix ("tiled").  For bfloat16 on a Hopper GPU
there are kernels in moe_jax/ops/mosaic ("mosaic"), and on a TPU jax's own kernels ("megablox").
Shapes that the kernels do not support use ragged_dot.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_jax.ops import megablox
from moe_jax.ops.mosaic import choose
from moe_jax.parallel.collectives import varying_like


@jax.custom_vjp
def grouped_matmul(
    x_ND: Float[Array, "N D"], w_EDF: Float[Array, "E D F"], sizes_E: Int[Array, "E"]
) -> Float[Array, "N F"]:
    """The grouped matmul y[n] = x[n] @ w[group of n].

    Args:
      x_ND: rows, sorted by group.
      w_EDF: one matrix per group.
      sizes_E: rows per group, int32; rows >= their sum are padding, unspecified in the output.

    Returns:
      [N, F] in the dtype of x.

    Reference: MegaBlocks, arXiv 2211.15841.
    """
    return _run("forward", x_ND, w_EDF, sizes_E, kernels=_kernels(x_ND, w_EDF))


def _save(x_ND, w_EDF, sizes_E):
    return grouped_matmul(x_ND, w_EDF, sizes_E), (x_ND, w_EDF, sizes_E)


def _backward(saved, dy_NF):
    x_ND, w_EDF, sizes_E = saved
    kernels = _kernels(x_ND, w_EDF)
    dx_ND = _run("input_gradient", dy_NF, w_EDF, sizes_E, kernels=kernels)
    dw_EDF = weight_gradient(x_ND, w_EDF, dy_NF, sizes_E)
    return dx_ND, dw_EDF, np.zeros(sizes_E.shape, jax.dtypes.float0)


grouped_matmul.defvjp(_save, _backward)


def weight_gradient(
    x_ND: Float[Array, "N D"],
    w_EDF: Float[Array, "E D F"],
    dy_NF: Float[Array, "N F"],
    sizes_E: Int[Array, "E"],
) -> Float[Array, "E D F"]:
    """The weight gradient dw[e] = x[rows of e]^T @ dy[rows of e], by the best implementation."""
    return _run("weight_gradient", x_ND, dy_NF, sizes_E, kernels=_kernels(x_ND, w_EDF))


def _kernels(x_ND: jax.Array, w_EDF: jax.Array) -> dict[str, str]:
    """The best implementation for these operands, by platform."""
    return {
        "cpu": "tiled",
        "cuda": "mosaic" if choose.supports(x_ND, w_EDF) else "ragged",
        "tpu": "megablox" if megablox.supports(x_ND, w_EDF) else "ragged",
    }


def _run(product: str, *operands: jax.Array, kernels: dict[str, str]) -> jax.Array:
    """Run one product by the implementation for the platform that it is compiled for."""
    products = {where: getattr(IMPLEMENTATIONS[name], product) for where, name in kernels.items()}
    return jax.lax.platform_dependent(
        *operands, **products, default=getattr(IMPLEMENTATIONS["ragged"], product)
    )


def reference(
    x_ND: Float[Array, "N D"], w_EDF: Float[Array, "E D F"], sizes_E: Int[Array, "E"]
) -> Float[Array, "N F"]:
    """The slow reference: multiply every row by every matrix, then mask; padding rows give 0."""
    ends_E = jnp.cumsum(sizes_E)
    row = jnp.arange(x_ND.shape[0])[:, None]
    mask_NE = (row < ends_E) & (row >= ends_E - sizes_E)
    y_ENF = jnp.einsum("nd,edf->enf", x_ND, w_EDF, precision="highest")
    return jnp.einsum("ne,enf->nf", mask_NE.astype(y_ENF.dtype), y_ENF, precision="highest")


def ragged_weight_gradient(x_ND, dy_NF, sizes_E):
    """The weight gradient dw[e] = x[rows of e]^T @ dy[rows of e], by ragged_dot's transpose."""
    shape = (sizes_E.shape[0], x_ND.shape[1], dy_NF.shape[1])
    inside = jnp.arange(x_ND.shape[0])[:, None] < sizes_E.sum()
    # Mask both sides, because padding rows may hold anything and 0 * NaN is NaN.
    x_ND, dy_NF = jnp.where(inside, x_ND, 0), jnp.where(inside, dy_NF, 0)
    zeros = varying_like(jnp.zeros(shape, x_ND.dtype), x_ND)
    _, pullback = jax.vjp(lambda w: jax.lax.ragged_dot(x_ND, w, sizes_E), zeros)
    return pullback(dy_NF)[0]


def tile_rows(rows: int, groups: int) -> int:
    """The rows per tile: about half the mean group, so that a group's last tile wastes little."""
    mean = max(1, rows // max(1, groups))
    return int(min(256, max(8, 2 ** (mean.bit_length() - 1))))


def _tiles(sizes_E: jax.Array, tile: int):
    """The number of tiles before each group [E + 1], and each group's first row [E + 1]."""
    zero = varying_like(jnp.zeros(1, jnp.int32), sizes_E)
    sizes_E = sizes_E.astype(jnp.int32)
    before = jnp.concatenate([zero, jnp.cumsum((sizes_E + tile - 1) // tile)])
    first = jnp.concatenate([zero, jnp.cumsum(sizes_E)])
    return before.astype(jnp.int32), first.astype(jnp.int32)


def _locate(t, before, first, tile: int):
    """The group, first row and end row of tile t."""
    e = jnp.searchsorted(before, t, side="right").astype(jnp.int32) - 1
    row = first[e] + (t - before[e]) * tile
    return e, row, jnp.minimum(row + tile, first[e + 1])


def tiled_forward(x_ND, w_EDF, sizes_E):
    """Multiply tiles in order; the next group's first tile overwrites rows past a group's end."""
    N = x_ND.shape[0]
    tile = tile_rows(N, w_EDF.shape[0])
    before, first = _tiles(sizes_E, tile)
    x_ND = jnp.pad(x_ND, ((0, tile), (0, 0)))

    def body(t, y_NF):
        e, row, _ = _locate(t, before, first, tile)
        x = jax.lax.dynamic_slice_in_dim(x_ND, row, tile)
        w = jax.lax.dynamic_index_in_dim(w_EDF, e, keepdims=False)
        return jax.lax.dynamic_update_slice_in_dim(y_NF, x @ w, row, 0)

    start = varying_like(jnp.zeros((N + tile, w_EDF.shape[2]), x_ND.dtype), x_ND)
    return jax.lax.fori_loop(0, before[-1], body, start)[:N]


def tiled_weight_gradient(x_ND, dy_NF, sizes_E):
    """Add each tile's x^T @ dy to its group's gradient, in place."""
    N, D = x_ND.shape
    F, E = dy_NF.shape[1], sizes_E.shape[0]
    tile = tile_rows(N, E)
    before, first = _tiles(sizes_E, tile)
    x_ND, dy_NF = (jnp.pad(a, ((0, tile), (0, 0))) for a in (x_ND, dy_NF))

    def body(t, dw_EDF):
        e, row, end = _locate(t, before, first, tile)
        inside = (row + jnp.arange(tile))[:, None] < end
        x = jnp.where(inside, jax.lax.dynamic_slice_in_dim(x_ND, row, tile), 0)
        dy = jnp.where(inside, jax.lax.dynamic_slice_in_dim(dy_NF, row, tile), 0)
        dw = jax.lax.dynamic_index_in_dim(dw_EDF, e) + (x.T @ dy)[None]
        return jax.lax.dynamic_update_index_in_dim(dw_EDF, dw, e, 0)

    start = varying_like(jnp.zeros((E, D, F), x_ND.dtype), x_ND)
    return jax.lax.fori_loop(0, before[-1], body, start)


# The kernels are imported only if they run, because jax's interfaces to them still change.  They
# do not declare varying axes.
def _mosaic_forward(x_ND, w_EDF, sizes_E):
    from moe_jax.ops.mosaic.product import grouped_product

    return varying_like(grouped_product(x_ND, w_EDF, sizes_E), x_ND)


def _mosaic_input_gradient(dy_NF, w_EDF, sizes_E):
    from moe_jax.ops.mosaic.product import grouped_product

    return varying_like(grouped_product(dy_NF, w_EDF, sizes_E, transpose=True), dy_NF)


def _mosaic_weight_gradient(x_ND, dy_NF, sizes_E):
    from moe_jax.ops.mosaic.weight_gradient import grouped_weight_gradient

    return varying_like(grouped_weight_gradient(x_ND, dy_NF, sizes_E), x_ND)


def _of_transposed(forward: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The input gradient, computed by `forward` with every matrix transposed."""
    return lambda dy_NF, w_EDF, sizes_E: forward(dy_NF, w_EDF.swapaxes(1, 2), sizes_E)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """The three products: (x, w, sizes) -> y, (dy, w, sizes) -> dx and (x, dy, sizes) -> dw."""

    forward: Callable[..., jax.Array]
    input_gradient: Callable[..., jax.Array]
    weight_gradient: Callable[..., jax.Array]


IMPLEMENTATIONS = {
    "ragged": Implementation(
        jax.lax.ragged_dot, _of_transposed(jax.lax.ragged_dot), ragged_weight_gradient
    ),
    "tiled": Implementation(tiled_forward, _of_transposed(tiled_forward), tiled_weight_gradient),
    "mosaic": Implementation(_mosaic_forward, _mosaic_input_gradient, _mosaic_weight_gradient),
    "megablox": Implementation(megablox.forward, megablox.input_gradient, megablox.weight_gradient),
}
