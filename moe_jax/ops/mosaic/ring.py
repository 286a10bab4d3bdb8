"""A ring of operand tiles in shared memory: one warpgroup loads, two multiply.

The loader runs ahead of the multipliers across output tiles, so that a tile's epilogue hides the
loads of the next.  Every barrier is waited for once for each time it completes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

SWIZZLE = 128  # bytes; the widest shared-memory pattern, 64 bfloat16 numbers
DEPTH = 64  # of one step of the contraction
MULTIPLIERS = 2  # warpgroups; the next one loads
LOADER_REGISTERS, MULTIPLIER_REGISTERS = 40, 232  # a thread; 64 Ki for three warpgroups in all
SMS = 132
ALIGN = 8  # rows; where a copy of a swizzled tile may start
STRIP = 64  # columns of the output stored at once


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a kernel cuts its output and in which order it goes through the pieces.

    rows, cols: the output tile of one block.  by_rows: its two multipliers share it by rows, else
    by columns.  stages: steps of the ring.  band: row tiles that are walked together across all
    column tiles, so that their operands stay in the L2 cache.  pair: two blocks side by side along
    the columns load their common rows once.  delay: products in flight while the next is issued.
    """

    rows: int
    cols: int
    by_rows: bool
    stages: int
    band: int
    pair: bool = False
    delay: int = 1
    slots: int = 2
    stagger: int = 0

    @property
    def piece(self) -> tuple[int, int]:
        """Rows and columns of one multiplier's part of the tile."""
        if self.by_rows:
            return self.rows // MULTIPLIERS, self.cols
        return self.rows, self.cols // MULTIPLIERS

    @property
    def blocks(self) -> int:
        """Blocks that work side by side on one unit of the schedule."""
        return 2 if self.pair else 1


def swizzled(shape: tuple[int, ...], dtype: Any):
    """Shared memory that the copy engine and the tensor cores both read."""
    transforms = (plgpu.TilingTransform((8, SWIZZLE // 2)), plgpu.SwizzleTransform(SWIZZLE))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def scratch(tiles: Tiles, a_shape, b_shape, dtype) -> dict[str, Any]:
    """Operand ring, output staging, and two barriers a slot.

    `full`: both operands have come.  `empty`: every multiplier is done with them.
    """
    arrivals: dict[str, Any] = {"num_arrivals": MULTIPLIERS, "num_barriers": tiles.stages}
    if tiles.pair:
        empty = plgpu.ClusterBarrier(collective_axes=("pair",), **arrivals)
    else:
        empty = plgpu.Barrier(**arrivals)
    return {
        "a": swizzled((tiles.stages, *a_shape), dtype),
        "b": swizzled((tiles.stages, *b_shape), dtype),
        "out": swizzled((MULTIPLIERS, tiles.slots, STRIP, STRIP), dtype),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
        "empty": empty,
        "turn": plgpu.Barrier(num_arrivals=1, num_barriers=1),
    }


def launch(body, out_type, tiles: Tiles, scratch_types, interpret=None):
    """A grid that fills the chip once, three warpgroups a block."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=(SMS // tiles.blocks,),
        grid_names=("unit",),
        **({"cluster": (2,), "cluster_names": ("pair",)} if tiles.pair else {}),
        num_threads=MULTIPLIERS + 1,
        thread_name="warpgroup",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )


def my_units(total) -> tuple[Any, Any]:
    """(first, how many) of this block's units: first, first + grid, ..."""
    first, grid = lax.axis_index("unit"), lax.axis_size("unit")
    return first, lax.div(total - first + (grid - 1), jnp.int32(grid))


def load_all(tiles: Tiles, full, empty, total, plan: Callable[[Any], tuple[Any, Callable]]) -> None:
    """The loader: plan(unit) gives the unit's steps and load(step, slot, barrier)."""
    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
    first, count = my_units(total)

    def one_unit(i, done):
        steps, load = plan(first + i * lax.axis_size("unit"))

        def one_step(k, done):
            slot = lax.rem(done, jnp.int32(tiles.stages))
            plgpu.barrier_wait(empty.at[slot])
            load(k, slot, full.at[slot])
            return done + 1

        return lax.fori_loop(0, steps, one_step, done)

    lax.fori_loop(0, count, one_unit, jnp.int32(0))
    for slot in range(tiles.stages):  # a block outlives its partner's use of its shared memory
        plgpu.barrier_wait(empty.at[slot])


def multiply_all(tiles: Tiles, full, empty, turn, total, plan: Callable[[Any], tuple]) -> None:
    """A multiplier: plan(unit) gives steps, product(acc, step, slot) and store(result)."""
    plgpu.set_max_registers(MULTIPLIER_REGISTERS, action="increase")
    for slot in range(tiles.stages):
        plgpu.barrier_arrive(empty.at[slot])
    first, count = my_units(total)
    stages = jnp.int32(tiles.stages)

    def one_unit(i, done):
        steps, product, store = plan(first + i * lax.axis_size("unit"))
        wg = lax.axis_index("warpgroup")
        if tiles.stagger:

            @pl.when((i == 0) & (wg == 1))
            def _():
                plgpu.barrier_wait(turn.at[0])

        def one_step(k, acc):
            slot = lax.rem(done + k, stages)
            if tiles.stagger:

                @pl.when((done + k == tiles.stagger) & (wg == 0))
                def _():
                    plgpu.barrier_arrive(turn.at[0])
            plgpu.barrier_wait(full.at[slot])
            product(acc, k, slot)
            plgpu.wgmma_wait(tiles.delay)
            if tiles.delay:  # the products before these are complete

                @pl.when(k > 0)
                def _():
                    plgpu.barrier_arrive(empty.at[lax.rem(done + k - 1, stages)])

            else:
                plgpu.barrier_arrive(empty.at[slot])

        def sum_of_products(acc):
            @pl.loop(0, steps)
            def _(k):
                one_step(k, acc)

            result = acc[...]
            if tiles.delay:

                @pl.when(steps > 0)
                def _():
                    plgpu.barrier_arrive(empty.at[lax.rem(done + steps - 1, stages)])

            return result

        result = pl.run_scoped(sum_of_products, plgpu.ACC(tiles.piece, jnp.float32))
        store(result)
        return done + steps

    lax.fori_loop(0, count, one_unit, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def store(tiles: Tiles, result, out, target: Callable[[int, int], Any]) -> None:
    """Round the sums, stage them in squares and copy each to target(first row, first column)."""
    result = result.astype(out.dtype)
    rows, cols = tiles.piece
    corners = [(r, c) for r in range(0, rows, STRIP) for c in range(0, cols, STRIP)]
    for number, (r, c) in enumerate(corners):
        staged = out.at[lax.axis_index("warpgroup"), number % tiles.slots]
        plgpu.wait_smem_to_gmem(tiles.slots - 1, wait_read_only=True)
        staged[...] = result[r : r + STRIP, c : c + STRIP]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, target(r, c))
