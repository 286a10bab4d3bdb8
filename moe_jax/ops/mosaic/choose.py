"""Decides whether the kernels run, and with which tiles.

A block has two warpgroups that multiply, so half of its tile, in float32, must fit the registers
of one warpgroup.  The tiles and the ring's stages together fill the 227 KiB of shared memory.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.parallel.collectives import partitioned

FIRST_JAX = (0, 11)  # the first version with which the kernels were run
CAPABILITY = "9.0"  # wgmma exists only on Hopper
ALIGN = 8  # a copy of a swizzled tile must begin at a multiple of this many rows
TILE_ROWS, WIDE, NARROW = 128, 256, 128
MULTIPLIERS = 2  # warpgroups of a block that multiply
MAX_WAVES, MIN_ROUNDS = 8, 12
SMS = 132  # multiprocessors of an H100 or H200, used if the device does not tell


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiling of a kernel's output, and the order in which it computes the tiles.

    rows, cols: the output tile of one block.  by_rows: its two multipliers divide it by rows, else
    by columns.  stages: steps of the contraction in flight.  band: row tiles computed together
    across all columns, so that their operands stay in the L2 cache.
    """

    rows: int
    cols: int
    by_rows: bool
    stages: int
    band: int = 16

    @property
    def piece(self) -> tuple[int, int]:
        """The rows and columns of one multiplier's part of the tile."""
        if self.by_rows:
            return self.rows // MULTIPLIERS, self.cols
        return self.rows, self.cols // MULTIPLIERS


def product_tiles(cols: int) -> Tiles:
    """The tiles of the forward product or the input gradient with `cols` output columns."""
    if cols % WIDE == 0:
        return Tiles(TILE_ROWS, WIDE, by_rows=True, stages=4)
    return Tiles(TILE_ROWS, NARROW, by_rows=True, stages=6)


def weight_gradient_tiles(cols: int) -> Tiles:
    """The tiles of the weight gradient; dividing by columns is 4% faster at 1024 x 2048."""
    if cols % WIDE == 0:
        return Tiles(TILE_ROWS, WIDE, by_rows=False, stages=4)
    return Tiles(TILE_ROWS, NARROW, by_rows=False, stages=6)


def supports(
    x_ND: jax.Array | jax.ShapeDtypeStruct, w_EDF: jax.Array | jax.ShapeDtypeStruct
) -> bool:
    """True if the kernels support these operands and the process has a GPU that runs them."""
    (N, D), F = x_ND.shape, w_EDF.shape[2]
    whole = N % ALIGN == 0 and N >= TILE_ROWS and D % NARROW == 0 and F % NARROW == 0
    return x_ND.dtype == w_EDF.dtype == jnp.bfloat16 and whole and runs_here()


def supports_rows(x_ND: jax.Array) -> bool:
    """True if the kernels of whole rows support `x_ND` and the process has a GPU that runs them."""
    return x_ND.dtype == jnp.bfloat16 and x_ND.shape[-1] % NARROW == 0 and runs_here()


def runs_here() -> bool:
    """True if this jax, this process's first device and the traced code can run the kernels."""
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    return jax.__version_info__ >= FIRST_JAX and capability == CAPABILITY and not partitioned()


def multiprocessors() -> int:
    """The number of multiprocessors of the chip: that many blocks fill it once."""
    return getattr(jax.local_devices()[0], "core_count", SMS)


def count_waves(units: int) -> int:
    """The number of blocks that a multiprocessor runs one after another, for `units` of work.

    With one device, one block per multiprocessor is fastest.  With several, NCCL's kernels hold
    some multiprocessors for a while, and blocks that wait for those end late; with several shorter
    blocks, those run on free multiprocessors instead (with fsdp 2, steps of bench_olmoe_half took
    311 instead of 314 ms, of bench_mixtral_2b 275 instead of 281).  Starting a block costs time
    (eight waves cost 1% on one device), so each block has at least MIN_ROUNDS units.
    """
    if jax.device_count() == 1:
        return 1
    return max(1, min(MAX_WAVES, units // (multiprocessors() * MIN_ROUNDS)))
