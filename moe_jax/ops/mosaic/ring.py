"""A ring of operand tiles in shared memory: one warpgroup loads, two multiply.

The grid fills the chip once or several times, and every block computes its units of work (output
tiles) in one loop.  The loader runs ahead across units, so that the first loads of a unit overlap
with the epilogue of the unit before.  Each completion of a barrier is waited for exactly once.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from moe_jax.ops.mosaic.choose import MULTIPLIERS, Tiles, count_waves, multiprocessors

SWIZZLE = 128  # bytes per step of the contraction: the widest swizzle
SQUARE = 64  # rows and columns of the pieces in which results are stored
STAGED = 2  # squares that one multiplier stores at a time
LOADER_REGISTERS, MULTIPLIER_REGISTERS = 40, 232  # per thread; three warpgroups share 64 Ki


def depth(dtype: DTypeLike) -> int:
    """The number of elements in one step of the contraction."""
    return SWIZZLE // jnp.dtype(dtype).itemsize


def swizzled(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """Shared memory that both the copy engine and the tensor cores read without bank conflicts."""
    # pyright takes jax 0.12's classes for abstract ones, which they are not.
    tiling = plgpu.TilingTransform((8, depth(dtype)))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(SWIZZLE)  # pyright: ignore[reportAbstractUsage]
    transforms = (tiling, swizzle)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def staging(dtype: DTypeLike) -> Any:
    """Shared memory for the squares being stored."""
    return swizzled((MULTIPLIERS, STAGED, SQUARE, SQUARE), dtype)


def launch(
    body: Callable,
    units: int,
    out_type: Any,
    tiles: Tiles,
    dtype: DTypeLike,
    a_shape,
    b_shape,
    out: Any,
) -> Callable:
    """Build a kernel of body(*inputs, result, a, b, full, empty, out).

    Args:
      body: a and b are the ring's operands; barrier `full` of a slot completes if both operands are
        loaded, barrier `empty` if both multipliers have finished with them.
      units: of work, approximately.
      out_type: of the result.
      tiles: of the output.
      dtype: of a and b.
      a_shape, b_shape: of one slot.
      out: memory from which results are stored.
    """
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=[
            swizzled((tiles.stages, *a_shape), dtype),
            swizzled((tiles.stages, *b_shape), dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
            plgpu.Barrier(num_arrivals=MULTIPLIERS, num_barriers=tiles.stages),
            out,
        ],
        grid=(multiprocessors() * count_waves(units),),
        grid_names=("block",),
        num_threads=MULTIPLIERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )


def locate(unit, row_tiles, col_tiles: int, tiles: Tiles):
    """The row and column tile of a unit: band by band, and column by column inside a band."""
    per_band = jnp.int32(tiles.band * col_tiles)
    first = lax.div(unit, per_band) * tiles.band
    width = jnp.minimum(row_tiles - first, tiles.band)
    inside = lax.rem(unit, per_band)
    return first + lax.rem(inside, width), lax.div(inside, width)


def run(full, empty, tiles: Tiles, total, loads: Callable, products: Callable) -> None:
    """Run the loader or a multiplier, by warpgroup, on this block's part of units 0 .. total - 1.

    loads(unit) returns (steps, load), where load(step, slot, barrier) starts the copies of a step.
    products(unit) returns (steps, multiply, store), where multiply(accumulator, step, slot) starts
    the matmuls of a step and store(sums) writes the unit's result.
    """
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == MULTIPLIERS)
    def _():
        _load_all(full, empty, tiles, total, loads)

    @pl.when(warpgroup < MULTIPLIERS)
    def _():
        _multiply_all(full, empty, tiles, total, products)


def _my_units(total) -> tuple[Callable, Any]:
    """The units of this block: a function from i to unit, and their number."""
    chip = multiprocessors()
    return share(lax.axis_index("block"), chip, lax.axis_size("block") // chip, total)


def share(block, chip: int, waves: int, total) -> tuple[Callable, Any]:
    """The units of `block`, one of chip * waves: a function from i to unit, and their number.

    A round is one unit for each multiprocessor; waves of blocks differ by at most one round.
    Rounds are dealt forwards and backwards in turn: if units are sorted by size, dealing always
    forwards would give the first blocks the larger unit of every round.
    """
    wave, mine = lax.div(block, jnp.int32(chip)), lax.rem(block, jnp.int32(chip))
    rounds = lax.div(total + (chip - 1), jnp.int32(chip))
    first, end = (lax.div(w * rounds, jnp.int32(waves)) for w in (wave, wave + 1))

    def unit(i):
        number = first + i
        forwards = lax.rem(number, jnp.int32(2)) == 0
        return number * chip + jnp.where(forwards, mine, chip - 1 - mine)

    count = end - first
    missing = (count > 0) & (unit(count - 1) >= total)  # the last round may not be full
    return unit, count - missing.astype(jnp.int32)


def _load_all(full, empty, tiles: Tiles, total, loads: Callable) -> None:
    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
    unit, count = _my_units(total)

    def one_unit(i, done):
        steps, load = loads(unit(i))

        def one_step(k, done):
            slot = lax.rem(done, jnp.int32(tiles.stages))
            plgpu.barrier_wait(empty.at[slot])
            load(k, slot, full.at[slot])
            return done + 1

        return lax.fori_loop(0, steps, one_step, done)

    lax.fori_loop(0, count, one_unit, jnp.int32(0))


def _multiply_all(full, empty, tiles: Tiles, total, products: Callable) -> None:
    plgpu.set_max_registers(MULTIPLIER_REGISTERS, action="increase")
    for slot in range(tiles.stages):
        plgpu.barrier_arrive(empty.at[slot])
    unit, count = _my_units(total)

    def one_unit(i, done):
        steps, multiply, store = products(unit(i))

        def sum_products(sums):
            @pl.loop(0, steps)
            def _(k):
                slot = _slot(done + k, tiles)
                plgpu.barrier_wait(full.at[slot])
                multiply(sums, k, slot)
                plgpu.wgmma_wait(1)  # for all matmuls but those just started

                @pl.when(k > 0)
                def _():
                    plgpu.barrier_arrive(empty.at[_slot(done + k - 1, tiles)])

            result = sums[...]

            @pl.when(steps > 0)
            def _():
                plgpu.barrier_arrive(empty.at[_slot(done + steps - 1, tiles)])

            return result

        store(pl.run_scoped(sum_products, plgpu.WGMMAAccumulatorRef(tiles.piece, jnp.float32)))
        return done + steps

    lax.fori_loop(0, count, one_unit, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _slot(step, tiles: Tiles) -> jax.Array:
    return lax.rem(step, jnp.int32(tiles.stages))


def my_piece(tiles: Tiles) -> tuple[Any, Any]:
    """The first row and column of this warpgroup's piece within the tile."""
    rows, cols = tiles.piece
    warpgroup = lax.axis_index("warpgroup")
    if tiles.by_rows:
        return pl.multiple_of(warpgroup * rows, rows), 0
    return 0, pl.multiple_of(warpgroup * cols, cols)


def store_squares(sums, out, tiles: Tiles, target: Callable[[int, int], Any]) -> None:
    """Stage the rounded sums square by square and copy each to target(row, column)."""
    rows, cols = tiles.piece
    corners = [(r, c) for r in range(0, rows, SQUARE) for c in range(0, cols, SQUARE)]
    for number, (r, c) in enumerate(corners):
        square = out.at[lax.axis_index("warpgroup"), number % STAGED]
        plgpu.wait_smem_to_gmem(STAGED - 1, wait_read_only=True)
        square[...] = sums[r : r + SQUARE, c : c + SQUARE]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(square, target(r, c))
