"""When the kernels run, and with which tiles.

A block has two warpgroups that multiply, so half of its tile, in float32, must fit the registers
of one; the tiles and the ring's stages together fill the 227 KiB of shared memory.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.parallel.collectives import partitioned

FIRST_JAX = (0, 11)  # before it the kernels were never run
CAPABILITY = "9.0"  # wgmma exists on Hopper alone
ALIGN = 8  # rows; where a copy of a swizzled tile may begin
TILE_ROWS, WIDE, NARROW = 128, 256, 128
MULTIPLIERS = 2  # warpgroups of a block that multiply
MOST_WAVES, LEAST_ROUNDS = 8, 12
SMS = 132  # multiprocessors of an H100 or H200, where no device can be asked


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a kernel cuts its output and in which order it goes through the pieces.

    rows, cols: the output tile of one block.  by_rows: its two multipliers share it by rows, else
    by columns.  stages: steps of the contraction in flight.  band: row tiles that are walked
    together across all columns, so that their operands stay in the L2 cache.
    """

    rows: int
    cols: int
    by_rows: bool
    stages: int
    band: int = 16

    @property
    def piece(self) -> tuple[int, int]:
        """Rows and columns of one multiplier's part of the tile."""
        if self.by_rows:
            return self.rows // MULTIPLIERS, self.cols
        return self.rows, self.cols // MULTIPLIERS


def product_tiles(cols: int) -> Tiles:
    """Tiles for an output of `cols` columns of the forward product or the input gradient."""
    if cols % WIDE == 0:
        return Tiles(TILE_ROWS, WIDE, by_rows=True, stages=4)
    return Tiles(TILE_ROWS, NARROW, by_rows=True, stages=6)


def weight_gradient_tiles(cols: int) -> Tiles:
    """Likewise for the weight gradient; by columns it is 4% faster at 1024 x 2048."""
    if cols % WIDE == 0:
        return Tiles(TILE_ROWS, WIDE, by_rows=False, stages=4)
    return Tiles(TILE_ROWS, NARROW, by_rows=False, stages=6)


def supports(
    x_ND: jax.Array | jax.ShapeDtypeStruct, w_EDF: jax.Array | jax.ShapeDtypeStruct
) -> bool:
    """Whether the kernels take these operands and the process has a GPU that runs them."""
    (N, D), F = x_ND.shape, w_EDF.shape[2]
    whole = N % ALIGN == 0 and N >= TILE_ROWS and D % NARROW == 0 and F % NARROW == 0
    return x_ND.dtype == w_EDF.dtype == jnp.bfloat16 and whole and runs_here()


def supports_rows(x_ND: jax.Array) -> bool:
    """Whether the kernels of whole rows take `x_ND` and the process has a GPU that runs them."""
    return x_ND.dtype == jnp.bfloat16 and x_ND.shape[-1] % NARROW == 0 and runs_here()


def runs_here() -> bool:
    """Whether this jax and this process's first device can run the kernels, here in the trace."""
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    return jax.__version_info__ >= FIRST_JAX and capability == CAPABILITY and not partitioned()


def multiprocessors() -> int:
    """Blocks that fill the chip once."""
    return getattr(jax.local_devices()[0], "core_count", SMS)


def count_waves(units: int) -> int:
    """How many blocks a multiprocessor runs one after another, for so many units of work.

    One is best alone on the chip.  Beside other devices NCCL's kernels hold some multiprocessors
    for a while, and blocks that wait for those end late by as much: shorter blocks go to the free
    ones instead (314 to 311 ms a step of bench_olmoe_half with fsdp 2, 281 to 275 of
    bench_mixtral_2b).  Starting a block is not free (eight waves cost 1% alone on the chip), so
    each has LEAST_ROUNDS units or more.
    """
    if jax.device_count() == 1:
        return 1
    return max(1, min(MOST_WAVES, units // (multiprocessors() * LEAST_ROUNDS)))
