"""y[rows of e] = x[rows of e] @ w[e], or @ w[e]^T: the forward product and the input gradient."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.ops.mosaic import ring
from moe_jax.ops.mosaic.ring import DEPTH, Tiles


def row_tiles(sizes_E: jax.Array, rows: int, tile: int) -> tuple[jax.Array, jax.Array]:
    """Row tiles as (group, first row, first row to store, end of the rows to store), [4, tiles].

    Also how many there are, [1].  Copies of swizzled tiles start at multiples of 8 rows, so a
    group's first tile may begin up to 7 rows before the group.
    """
    E = sizes_E.shape[0]
    sizes_E = sizes_E.astype(jnp.int32)
    upto = jnp.arange(E)[:, None] >= jnp.arange(E)[None, :]
    last_E = jnp.sum(jnp.where(upto, sizes_E, 0), axis=1)
    first_E = last_E - sizes_E
    aligned_E = first_E // ring.ALIGN * ring.ALIGN
    tiles_E = jnp.where(sizes_E > 0, (last_E - aligned_E + tile - 1) // tile, 0)
    after_E = jnp.sum(jnp.where(upto, tiles_E, 0), axis=1)
    t = jnp.arange(rows // tile + 2 * E, dtype=jnp.int32)
    group_T = jnp.minimum(jnp.sum(t[:, None] >= after_E[None, :], axis=1), E - 1)
    row_T = aligned_E[group_T] + (t - (after_E - tiles_E)[group_T]) * tile
    begin_T = jnp.maximum(first_E[group_T], row_T)
    end_T = jnp.minimum(last_E[group_T], row_T + tile)
    return jnp.stack([group_T, row_T, begin_T, end_T]).astype(jnp.int32), after_E[-1:]


def grouped_product(x_NK, w_EKM, sizes_E, tiles: Tiles, transpose: bool, interpret=None):
    """x [N, K] times w [E, K, M], or w [E, M, K] when `transpose`."""
    N, K = x_NK.shape
    M = w_EKM.shape[1] if transpose else w_EKM.shape[2]
    table, count = row_tiles(sizes_E, N, tiles.rows)
    cols = M // (tiles.cols * tiles.blocks)
    b_shape = (tiles.cols, DEPTH) if transpose else (DEPTH, tiles.cols)

    def locate(unit, table, count):
        """Row tile and column tile of a unit: bands of row tiles, columns outermost in a band."""
        per_band = jnp.int32(tiles.band * cols)
        first = lax.div(unit, per_band) * tiles.band
        width = jnp.minimum(count[0] - first, tiles.band)
        inside = lax.rem(unit, per_band)
        m, n = first + lax.rem(inside, width), lax.div(inside, width)
        if tiles.pair:
            n = n * 2 + lax.axis_index("pair")
        row = pl.multiple_of(table[1, m], ring.ALIGN)
        return m, table[0, m], row, pl.multiple_of(n * tiles.cols, tiles.cols)

    def body(table, count, x, w, y, a, b, out, full, empty, turn):
        out, tail = out
        wg = lax.axis_index("warpgroup")
        total = count[0] * cols

        def plan_loads(unit):
            _, e, row, col = locate(unit, table, count)

            def load(k, slot, barrier):
                at = pl.ds(pl.multiple_of(k * DEPTH, DEPTH), DEPTH)
                plgpu.copy_gmem_to_smem(
                    x.at[pl.ds(row, tiles.rows), at],
                    a.at[slot],
                    barrier,
                    collective_axes="pair" if tiles.pair else None,
                )
                these = pl.ds(col, tiles.cols)
                source = w.at[e, these, at] if transpose else w.at[e, at, these]
                plgpu.copy_gmem_to_smem(source, b.at[slot], barrier)

            return K // DEPTH, load

        def plan_products(unit):
            m, _, row, col = locate(unit, table, count)
            rows, width = tiles.piece
            mine_a = pl.ds(pl.multiple_of(wg * rows, rows), rows) if tiles.by_rows else slice(None)
            mine_b = slice(None) if tiles.by_rows else pl.ds(pl.multiple_of(wg * width, width), width)

            def product(acc, k, slot):
                right = b.at[slot, mine_b] if transpose else b.at[slot, :, mine_b]
                if transpose:
                    right = plgpu.transpose_ref(right, (1, 0))
                plgpu.wgmma(acc, a.at[slot, mine_a], right)

            def store(result):
                r0 = pl.multiple_of(row + wg * rows, ring.ALIGN) if tiles.by_rows else row
                c0 = col if tiles.by_rows else pl.multiple_of(col + wg * width, width)
                begin, end = jnp.maximum(table[2, m], r0), jnp.minimum(table[3, m], r0 + rows)
                whole = end - begin == rows

                @pl.when(whole)
                def _():
                    ring.store(
                        tiles, result, out,
                        lambda r, c: y.at[pl.ds(r0 + r, ring.STRIP), pl.ds(c0 + c, ring.STRIP)],
                    )

                @pl.when(jnp.logical_not(whole))
                def _():
                    store_rows(tiles, result, tail, y, r0, c0, begin, end)

            return K // DEPTH, product, store

        @pl.when(wg == ring.MULTIPLIERS)
        def _():
            ring.load_all(tiles, full, empty, total, plan_loads)

        @pl.when(wg < ring.MULTIPLIERS)
        def _():
            ring.multiply_all(tiles, full, empty, turn, total, plan_products)

    kernel = ring.launch(
        body,
        jax.ShapeDtypeStruct((N, M), x_NK.dtype),
        tiles,
        with_tail(ring.scratch(tiles, (tiles.rows, DEPTH), b_shape, x_NK.dtype), x_NK.dtype),
        interpret,
    )
    return kernel(table, count, x_NK, w_EKM)


def with_tail(scratch, dtype):
    """Whole tiles are staged swizzled, tails plain: row runs cannot be cut from a swizzle."""
    tail = plgpu.SMEM(scratch["out"].shape, dtype)  # as large: no multiplier's part meets another's
    return scratch | {"out": plgpu.RefUnion(scratch["out"], tail)}


def store_rows(tiles: Tiles, result, tail, y, row, col, begin, end) -> None:
    """Rows [begin, end) of y, in runs of powers of two: the copy engine's boxes are static."""
    result = result.astype(tail.dtype)
    staged = tail.at[lax.axis_index("warpgroup"), 0]
    for part in range(tiles.piece[0] // 64):
        top = row + part * 64
        first = jnp.maximum(begin, top)
        count = jnp.maximum(jnp.minimum(end, top + 64) - first, 0)
        for strip in range(tiles.piece[1] // ring.STRIP):
            cols = slice(strip * ring.STRIP, (strip + 1) * ring.STRIP)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            staged[...] = result[part * 64 : (part + 1) * 64, cols]
            plgpu.commit_smem()
            store_runs(staged, y, top, first, count, col + strip * ring.STRIP)


def store_runs(staged, y, top, first, count, col) -> None:
    for run in (64, 32, 16, 8, 4, 2, 1):
        at = first + lax.bitwise_and(count, jnp.int32(-2 * run))

        @pl.when(lax.bitwise_and(count, jnp.int32(run)) != 0)
        def _(run=run, at=at):
            plgpu.copy_smem_to_gmem(
                staged.at[pl.ds(at - top, run)],
                y.at[pl.ds(at, run), pl.ds(pl.multiple_of(col, ring.STRIP), ring.STRIP)],
            )
