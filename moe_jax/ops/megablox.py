"""The grouped matmul on TPUs: each product by megablox, the Pallas kernels that jax ships.

Axes: N rows, E groups (experts), D input width, F output width.  Groups may begin at any row: the
kernels mask rows when they store (`gmm`) or load (`tgmm`) them.  An empty group's gradient is
written as zero, and padding rows are not written.  N must be a multiple of the row tile.
megablox's own VJP is not used, because it has one tiling for all three products.
"""

import contextlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Int

from moe_jax.parallel.collectives import partitioned, varying_like

LANES = 128  # columns of a TPU register
ROW_TILES = (512, 256, LANES)
COL_TILES = (1024, *ROW_TILES)


def supports(x_ND: jax.Array, w_EDF: jax.Array) -> bool:
    """True if the kernels support these operands and the process has a TPU."""
    (N, D), F = x_ND.shape, w_EDF.shape[2]
    whole = N > 0 and all(size % LANES == 0 for size in (N, D, F))
    return x_ND.dtype == w_EDF.dtype == jnp.bfloat16 and whole and runs_here()


def runs_here() -> bool:
    """True if this process's first device is a TPU and XLA does not partition the traced code."""
    return jax.local_devices()[0].platform == "tpu" and not partitioned()


def tiling(rows: int, groups: int, depth: int, cols: int) -> tuple[int, int, int]:
    """Tile sizes that divide rows, depth and columns; a row tile is at most the mean group."""
    mean = max(LANES, rows // groups)
    return (
        next(tile for tile in ROW_TILES if rows % tile == 0 and tile <= mean),
        next(tile for tile in COL_TILES if depth % tile == 0),
        next(tile for tile in COL_TILES if cols % tile == 0),
    )


def forward(
    x_ND: BFloat16[Array, "N D"], w_EDF: BFloat16[Array, "E D F"], sizes_E: Int[Array, "E"]
) -> BFloat16[Array, "N F"]:
    """Compute x[rows of e] @ w[e], summed in float32 and rounded once."""
    return _product(x_ND, w_EDF, sizes_E, w_EDF.shape[2], transpose=False)


def input_gradient(
    dy_NF: BFloat16[Array, "N F"], w_EDF: BFloat16[Array, "E D F"], sizes_E: Int[Array, "E"]
) -> BFloat16[Array, "N D"]:
    """Compute dy[rows of e] @ w[e]^T, reading w without a transposed copy."""
    return _product(dy_NF, w_EDF, sizes_E, w_EDF.shape[1], transpose=True)


def _product(x_NK, w, sizes_E, cols: int, transpose: bool):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    tiles = tiling(x_NK.shape[0], w.shape[0], x_NK.shape[1], cols)
    with _undeclared():
        y = gmm(x_NK, w, sizes_E.astype(jnp.int32), x_NK.dtype, tiles, transpose_rhs=transpose)
    return varying_like(y, x_NK)


def weight_gradient(
    x_ND: BFloat16[Array, "N D"], dy_NF: BFloat16[Array, "N F"], sizes_E: Int[Array, "E"]
) -> BFloat16[Array, "E D F"]:
    """Compute x[rows of e]^T @ dy[rows of e]; zero for an empty group."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tiles = tiling(x_ND.shape[0], sizes_E.shape[0], x_ND.shape[1], dy_NF.shape[1])
    with _undeclared():
        dw = tgmm(x_ND.T, dy_NF, sizes_E.astype(jnp.int32), x_ND.dtype, tiles)
    return varying_like(dw, x_ND)


def _undeclared() -> contextlib.AbstractContextManager:
    """Switch off shard_map's check of varying axes, which megablox's kernels do not declare.

    The import is private, because jax's public switch, an argument of shard_map, is for the whole
    region and its gradients.
    """
    from jax._src import config

    return config._check_vma(False)
