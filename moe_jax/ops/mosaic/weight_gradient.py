"""dw[e] = x[rows of e]^T @ dy[rows of e]."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.ops.mosaic import ring
from moe_jax.ops.mosaic.ring import DEPTH, Tiles


def grouped_weight_gradient(x_NK, dy_NM, sizes_E, tiles: Tiles, interpret=None):
    """[E, K, M]; rows of other groups in a group's last step are zeroed on both sides."""
    (N, K), M, E = x_NK.shape, dy_NM.shape[1], sizes_E.shape[0]
    sizes_E = sizes_E.astype(jnp.int32)
    upto = jnp.arange(E)[:, None] >= jnp.arange(E)[None, :]
    last_E = jnp.sum(jnp.where(upto, sizes_E, 0), axis=1)
    first_E = last_E - sizes_E
    aligned_E = first_E // ring.ALIGN * ring.ALIGN
    steps_E = jnp.where(sizes_E > 0, (last_E - aligned_E + DEPTH - 1) // DEPTH, 0)
    table = jnp.stack([aligned_E, first_E, last_E, steps_E]).astype(jnp.int32)
    row_tiles, cols = K // tiles.rows, M // (tiles.cols * tiles.blocks)
    band = min(tiles.band, row_tiles)
    if row_tiles % band:
        raise ValueError(f"{row_tiles} row tiles do not divide into bands of {band}")

    def locate(unit, table):
        e, inside = lax.div(unit, jnp.int32(row_tiles * cols)), lax.rem(
            unit, jnp.int32(row_tiles * cols)
        )
        first = lax.div(inside, jnp.int32(band * cols)) * band
        inside = lax.rem(inside, jnp.int32(band * cols))
        m, n = first + lax.rem(inside, jnp.int32(band)), lax.div(inside, jnp.int32(band))
        if tiles.pair:
            n = n * 2 + lax.axis_index("pair")
        row = pl.multiple_of(m * tiles.rows, tiles.rows)
        return e, row, pl.multiple_of(n * tiles.cols, tiles.cols)

    def body(table, x, dy, dw, a, b, out, full, empty, turn):
        wg = lax.axis_index("warpgroup")
        total = jnp.int32(E * row_tiles * cols)

        def plan_loads(unit):
            e, row, col = locate(unit, table)
            start = table[0, e]

            def load(k, slot, barrier):
                at = pl.ds(pl.multiple_of(start + k * DEPTH, ring.ALIGN), DEPTH)
                plgpu.copy_gmem_to_smem(
                    x.at[at, pl.ds(row, tiles.rows)],
                    a.at[slot],
                    barrier,
                    collective_axes="pair" if tiles.pair else None,
                )
                plgpu.copy_gmem_to_smem(dy.at[at, pl.ds(col, tiles.cols)], b.at[slot], barrier)

            return table[3, e], load

        def plan_products(unit):
            e, row, col = locate(unit, table)
            start, first, last, steps = (table[i, e] for i in range(4))
            rows, width = tiles.piece
            mine_a = pl.ds(pl.multiple_of(wg * rows, rows), rows) if tiles.by_rows else slice(None)
            mine_b = slice(None) if tiles.by_rows else pl.ds(pl.multiple_of(wg * width, width), width)

            def product(acc, k, slot):
                left, right = a.at[slot, :, mine_a], b.at[slot, :, mine_b]
                begin, end = first - start - k * DEPTH, last - start - k * DEPTH

                @pl.when(lax.bitwise_or(begin > 0, end < DEPTH))
                def _():
                    keep_rows(a.at[slot], tiles.rows, begin, end)
                    keep_rows(b.at[slot], tiles.cols, begin, end)
                    plgpu.commit_smem()

                plgpu.wgmma(acc, plgpu.transpose_ref(left, (1, 0)), right)

            def store(result):
                r0 = pl.multiple_of(row + wg * rows, rows) if tiles.by_rows else row
                c0 = col if tiles.by_rows else pl.multiple_of(col + wg * width, width)
                ring.store(
                    tiles, result, out,
                    lambda r, c: dw.at[e, pl.ds(r0 + r, ring.STRIP), pl.ds(c0 + c, ring.STRIP)],
                )

            return steps, product, store

        @pl.when(wg == ring.MULTIPLIERS)
        def _():
            ring.load_all(tiles, full, empty, total, plan_loads)

        @pl.when(wg < ring.MULTIPLIERS)
        def _():
            ring.multiply_all(tiles, full, empty, turn, total, plan_products)

    kernel = ring.launch(
        body,
        jax.ShapeDtypeStruct((E, K, M), x_NK.dtype),
        tiles,
        ring.scratch(tiles, (DEPTH, tiles.rows), (DEPTH, tiles.cols), x_NK.dtype),
        interpret,
    )
    return kernel(table, x_NK, dy_NM)


def keep_rows(operand, width: int, begin, end) -> None:
    """Zero the rows outside [begin, end).  Both multipliers write the same values."""
    for first in range(0, width, 64):
        part = operand.at[:, first : first + 64]
        row = plgpu.layout_cast(
            lax.broadcasted_iota(jnp.int32, (DEPTH, 64), 0), plgpu.Layout.WGMMA
        )
        value = part[...]
        part[...] = jnp.where((row >= begin) & (row < end), value, jnp.zeros_like(value))
