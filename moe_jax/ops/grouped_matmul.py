"""Matmul of consecutive groups of rows, each with its own matrix.

Axes: N rows, E groups, D in, F out.  Group e owns the next sizes_E[e] rows.  Rows past the last
group are unspecified in the output and never reach a gradient.  An empty group has zero gradient.

The implementations of each leg (forward, input gradient, weight gradient) stand in
IMPLEMENTATIONS.  `jax.lax.ragged_dot` ("ragged") runs everywhere, but is a dense masked product on
the CPU backend (6 to 60 times the work) and far from the hardware on GPUs.  So on the CPU the
groups are cut into row tiles and a loop multiplies each tile by its group's matrix ("tiled"),
bfloat16 on a Hopper GPU has kernels of its own ("mosaic", moe_jax/ops/mosaic), and on a TPU those
that jax ships ("megablox").  Shapes that kernels do not take go through ragged_dot.
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
    """y[n] = x[n] @ w[group of n].

    Args:
      x_ND: rows, sorted by group.
      w_EDF: one matrix for each group.
      sizes_E: int32 rows of each group; rows past their sum are unspecified in the output.

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
    """dw[e] = x[rows of e]^T @ dy[rows of e], by the implementation that these operands get."""
    return _run("weight_gradient", x_ND, dy_NF, sizes_E, kernels=_kernels(x_ND, w_EDF))


def _kernels(x_ND: jax.Array, w_EDF: jax.Array) -> dict[str, str]:
    """Platform -> the implementation that is best there for these operands."""
    return {
        "cpu": "tiled",
        "cuda": "mosaic" if choose.supports(x_ND, w_EDF) else "ragged",
        "tpu": "megablox" if megablox.supports(x_ND, w_EDF) else "ragged",
    }


def _run(leg: str, *operands: jax.Array, kernels: dict[str, str]) -> jax.Array:
    """One leg by the implementation for the platform it is compiled for."""
    legs = {where: getattr(IMPLEMENTATIONS[name], leg) for where, name in kernels.items()}
    return jax.lax.platform_dependent(
        *operands, **legs, default=getattr(IMPLEMENTATIONS["ragged"], leg)
    )


def reference(
    x_ND: Float[Array, "N D"], w_EDF: Float[Array, "E D F"], sizes_E: Int[Array, "E"]
) -> Float[Array, "N F"]:
    """The slow reference: every row times every matrix, then a mask; rows past the end are 0."""
    ends_E = jnp.cumsum(sizes_E)
    row = jnp.arange(x_ND.shape[0])[:, None]
    mask_NE = (row < ends_E) & (row >= ends_E - sizes_E)
    y_ENF = jnp.einsum("nd,edf->enf", x_ND, w_EDF, precision="highest")
    return jnp.einsum("ne,enf->nf", mask_NE.astype(y_ENF.dtype), y_ENF, precision="highest")


def ragged_weight_gradient(x_ND, dy_NF, sizes_E):
    """dw[e] = x[rows of e]^T @ dy[rows of e], through ragged_dot's own transpose."""
    shape = (sizes_E.shape[0], x_ND.shape[1], dy_NF.shape[1])
    inside = jnp.arange(x_ND.shape[0])[:, None] < sizes_E.sum()
    # Both sides: rows past the last group may hold anything, and 0 * NaN is NaN.
    x_ND, dy_NF = jnp.where(inside, x_ND, 0), jnp.where(inside, dy_NF, 0)
    zeros = varying_like(jnp.zeros(shape, x_ND.dtype), x_ND)
    _, pullback = jax.vjp(lambda w: jax.lax.ragged_dot(x_ND, w, sizes_E), zeros)
    return pullback(dy_NF)[0]


def tile_rows(rows: int, groups: int) -> int:
    """Rows a tile: near half a group's mean, so that little of a last tile is waste."""
    mean = max(1, rows // max(1, groups))
    return int(min(256, max(8, 2 ** (mean.bit_length() - 1))))


def _tiles(sizes_E: jax.Array, tile: int):
    """(tiles before each group [E + 1], first row of each group [E + 1])."""
    zero = varying_like(jnp.zeros(1, jnp.int32), sizes_E)
    sizes_E = sizes_E.astype(jnp.int32)
    before = jnp.concatenate([zero, jnp.cumsum((sizes_E + tile - 1) // tile)])
    first = jnp.concatenate([zero, jnp.cumsum(sizes_E)])
    return before.astype(jnp.int32), first.astype(jnp.int32)


def _locate(t, before, first, tile: int):
    """Group, first row and end row of tile t."""
    e = jnp.searchsorted(before, t, side="right").astype(jnp.int32) - 1
    row = first[e] + (t - before[e]) * tile
    return e, row, jnp.minimum(row + tile, first[e + 1])


def tiled_forward(x_ND, w_EDF, sizes_E):
    """Tiles in order; a tile's rows past its group are overwritten by the next group's first."""
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
    """Adds each tile's outer product to its group's gradient, in place."""
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


# The kernels are imported where they run: jax's interfaces to them are young.  They declare no
# varying axes.
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
    """The input gradient as a forward product with every matrix transposed."""
    return lambda dy_NF, w_EDF, sizes_E: forward(dy_NF, w_EDF.swapaxes(1, 2), sizes_E)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """The three legs: (x, w, sizes) -> y, (dy, w, sizes) -> dx and (x, dy, sizes) -> dw."""

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
