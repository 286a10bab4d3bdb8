"""The forward product y[rows of e] = x[rows of e] @ w[e], or @ w[e]^T: the input gradient.

Axes: N rows, E groups (experts), K contracted width, M output columns, T row tiles.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float8e4m3fn, Int

from moe_jax.ops.mosaic import ring
from moe_jax.ops.mosaic.choose import ALIGN, Tiles, product_tiles
from moe_jax.ops.mosaic.ring import SQUARE

# Lengths of the runs in which rows at a group's edge are written.  A copy's shape is static; each
# shape costs start-up time.
RUNS = (16, 4, 1)


def grouped_product(
    x_NK: BFloat16[Array, "N K"] | Float8e4m3fn[Array, "N K"],
    w: BFloat16[Array, "E _ _"] | Float8e4m3fn[Array, "E _ _"],
    sizes_E: Int[Array, "E"],
    transpose: bool = False,
) -> BFloat16[Array, "N M"]:
    """Multiply x by w [E, K, M], or w [E, M, K] with `transpose`: float32 sums, rounded once.

    Both are bfloat16, or both float8_e4m3fn with `transpose`, because Hopper's tensor cores read
    float8 only with the contracted axis last.

    A row tile belongs to one group.  Its rows of other groups are multiplied but not stored, so NaN
    in them does not spread.  Padding rows (past the last group) are not written.
    """
    N, K = x_NK.shape
    M = w.shape[1] if transpose else w.shape[2]
    tiles, depth = product_tiles(M), ring.depth(x_NK.dtype)
    col_tiles = M // tiles.cols
    table, count = row_tiles(sizes_E, N, tiles.rows)

    def place(unit, table, count):
        """The row tile of a unit, its first row and its first column."""
        m, n = ring.locate(unit, count[0], col_tiles, tiles)
        return m, pl.multiple_of(table[1, m], ALIGN), pl.multiple_of(n * tiles.cols, tiles.cols)

    def body(table, count, x, w, y, a, b, full, empty, out):
        piece_rows, piece_cols = tiles.piece
        dr, dc = ring.my_piece(tiles)

        def loads(unit):
            m, row, col = place(unit, table, count)
            e, cols = table[0, m], pl.ds(col, tiles.cols)

            def load(k, slot, barrier):
                part = pl.ds(pl.multiple_of(k * depth, depth), depth)
                plgpu.copy_gmem_to_smem(x.at[pl.ds(row, tiles.rows), part], a.at[slot], barrier)
                source = w.at[e, cols, part] if transpose else w.at[e, part, cols]
                plgpu.copy_gmem_to_smem(source, b.at[slot], barrier)

            return K // depth, load

        def products(unit):
            m, row, col = place(unit, table, count)

            def multiply(sums, k, slot):
                del k
                cols = pl.ds(dc, piece_cols)
                right = b.at[slot, cols] if transpose else b.at[slot, :, cols]
                if transpose:
                    right = right.transpose((1, 0))
                plgpu.wgmma(sums, a.at[slot, pl.ds(dr, piece_rows)], right)

            def store(sums):
                top, left = pl.multiple_of(row + dr, ALIGN), pl.multiple_of(col + dc, piece_cols)
                _store(sums, out, y, tiles, top, left, table[2, m], table[3, m])

            return K // depth, multiply, store

        ring.run(full, empty, tiles, count[0] * col_tiles, loads, products)

    b_shape = (tiles.cols, depth) if transpose else (depth, tiles.cols)
    # Whole pieces are stored swizzled; at the edges of a group, runs of rows are stored plain.
    plain = plgpu.SMEM((ring.MULTIPLIERS, ring.STAGED, SQUARE, SQUARE), jnp.bfloat16)
    out = plgpu.RefUnion(ring.staging(jnp.bfloat16), plain)
    out_type = jax.ShapeDtypeStruct((N, M), jnp.bfloat16)
    units, a_shape = -(-N // tiles.rows) * col_tiles, (tiles.rows, depth)
    kernel = ring.launch(body, units, out_type, tiles, x_NK.dtype, a_shape, b_shape, out)
    return kernel(table, count, x_NK, w)


@functools.partial(jax.jit, static_argnums=(1, 2))  # so it is traced once per model
def row_tiles(sizes_E: jax.Array, rows: int, tile: int) -> tuple[jax.Array, jax.Array]:
    """The table of row tiles in order [4, tiles], and the number of tiles in use [1].

    Its rows are: group, first row of the tile, first row to store, end of the rows to store.  A
    tile begins at a multiple of ALIGN, so a group's first tile begins up to ALIGN - 1 rows early.
    """
    E = sizes_E.shape[0]
    first_E, last_E = bounds(sizes_E)
    aligned_E = first_E // ALIGN * ALIGN
    tiles_E = jnp.where(last_E > first_E, -((aligned_E - last_E) // tile), 0)
    before_E, after_E = bounds(tiles_E)
    t = jnp.arange(-(-rows // tile) + 2 * E, dtype=jnp.int32)
    group_T = jnp.minimum((t[:, None] >= after_E).sum(1, dtype=jnp.int32), E - 1)
    row_T = aligned_E[group_T] + (t - before_E[group_T]) * tile
    begin_T = jnp.maximum(first_E[group_T], row_T)
    end_T = jnp.minimum(last_E[group_T], row_T + tile)
    return jnp.stack([group_T, row_T, begin_T, end_T]), after_E[-1:]


def bounds(sizes_E: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first and end row of each group, by a masked sum because cumsum is a slow kernel."""
    e = jnp.arange(sizes_E.shape[0])
    sizes_E = sizes_E.astype(jnp.int32)
    last_E = jnp.where(e[:, None] >= e, sizes_E, 0).sum(1, dtype=jnp.int32)
    return last_E - sizes_E, last_E


def _store(sums, out, y, tiles: Tiles, top, left, begin, end) -> None:
    """Write rows [begin, end) of a piece whose first element is y[top, left]."""
    squares, plain = out
    rows, cols = tiles.piece
    assert rows == SQUARE
    begin, end = jnp.maximum(begin, top), jnp.minimum(end, top + rows)
    whole = end - begin == rows
    rounded = sums.astype(y.dtype)

    @pl.when(whole)
    def _():
        def target(r, c):
            return y.at[pl.ds(top + r, SQUARE), pl.ds(left + c, SQUARE)]

        ring.store_squares(rounded, squares, tiles, target)

    @pl.when(jnp.logical_not(whole))
    def _():
        mine, runs = plain.at[lax.axis_index("warpgroup")], _runs(begin, end)
        for c in range(0, cols, ring.STAGED * SQUARE):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for i in range(ring.STAGED):
                mine[i] = rounded[:, c + i * SQUARE : c + (i + 1) * SQUARE]
            plgpu.commit_smem()
            _store_runs(mine, y, top, left + c, runs)


def _runs(begin, end) -> list[tuple[int, Any, Any]]:
    """Cut rows [begin, end) into runs: (length, row at which the first begins, number of runs)."""
    runs = []
    for length in RUNS:
        count = lax.div(jnp.maximum(end - begin, 0), length)
        runs.append((length, begin, count))
        begin += count * length
    return runs


def _store_runs(squares, y, top, left, runs) -> None:
    """Copy row ranges of `squares` to y; square i goes to column left + i * SQUARE.

    Copy the last square last: `store_squares` lets the last copy overlap with its next write.
    """
    for length, begin, count in runs:

        @pl.loop(0, count)
        def _(i, length=length, begin=begin):
            row = begin + i * length
            for number in range(squares.shape[0]):
                cols = pl.ds(pl.multiple_of(left + number * SQUARE, SQUARE), SQUARE)
                square = squares.at[number, pl.ds(row - top, length)]
                plgpu.copy_smem_to_gmem(square, y.at[pl.ds(row, length), cols])
