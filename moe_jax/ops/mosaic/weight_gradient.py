"""The weight gradient dw[e] = x[rows of e]^T @ dy[rows of e].

Axes: N rows (contracted), E groups (experts), D and F the two sides of a weight.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Int

from moe_jax.ops.mosaic import ring
from moe_jax.ops.mosaic.choose import ALIGN, weight_gradient_tiles
from moe_jax.ops.mosaic.product import bounds
from moe_jax.ops.mosaic.ring import SQUARE

DEPTH = ring.depth(jnp.bfloat16)


def grouped_weight_gradient(
    x_ND: BFloat16[Array, "N D"], dy_NF: BFloat16[Array, "N F"], sizes_E: Int[Array, "E"]
) -> BFloat16[Array, "E D F"]:
    """Compute the weight gradient: float32 sums over a group's rows, rounded once.

    An empty group's gradient is 0.  Steps of the contraction begin at a multiple of ALIGN rows.  In
    a group's first and last step, rows of other groups are zeroed in both operands, because 0 * NaN
    is NaN.
    """
    (_, D), F, E = x_ND.shape, dy_NF.shape[1], sizes_E.shape[0]
    tiles = weight_gradient_tiles(F)
    row_tiles, col_tiles = D // tiles.rows, F // tiles.cols
    units = E * row_tiles * col_tiles
    first_E, last_E = bounds(sizes_E)
    start_E = first_E // ALIGN * ALIGN
    steps_E = jnp.where(last_E > first_E, -((start_E - last_E) // DEPTH), 0)
    table = jnp.stack([jnp.arange(E), start_E, steps_E, first_E - start_E, last_E - start_E])
    table = longest_first(table.astype(jnp.int32), steps_E)

    def place(unit):
        """The column of the table, the first row and the first column of a unit."""
        per_group = jnp.int32(row_tiles * col_tiles)
        m, n = ring.locate(lax.rem(unit, per_group), row_tiles, col_tiles, tiles)
        row, col = pl.multiple_of(m * tiles.rows, tiles.rows), n * tiles.cols
        return lax.div(unit, per_group), row, pl.multiple_of(col, tiles.cols)

    def body(table, x, dy, dw, a, b, full, empty, out):
        piece_rows, piece_cols = tiles.piece
        dr, dc = ring.my_piece(tiles)

        def loads(unit):
            g, row, col = place(unit)
            start = table[1, g]

            def load(k, slot, barrier):
                depth = pl.ds(pl.multiple_of(start + k * DEPTH, ALIGN), DEPTH)
                plgpu.copy_gmem_to_smem(x.at[depth, pl.ds(row, tiles.rows)], a.at[slot], barrier)
                plgpu.copy_gmem_to_smem(dy.at[depth, pl.ds(col, tiles.cols)], b.at[slot], barrier)

            return table[2, g], load

        def products(unit):
            g, row, col = place(unit)
            e, begin, end = table[0, g], table[3, g], table[4, g]
            top, left = pl.multiple_of(row + dr, piece_rows), pl.multiple_of(col + dc, piece_cols)

            def multiply(sums, k, slot):
                x_part = a.at[slot, :, pl.ds(dr, piece_rows)]
                dy_part = b.at[slot, :, pl.ds(dc, piece_cols)]
                first, last = begin - k * DEPTH, end - k * DEPTH

                @pl.when((first > 0) | (last < DEPTH))
                def _():
                    _keep_rows(x_part, first, last)
                    _keep_rows(dy_part, first, last)
                    plgpu.commit_smem()

                plgpu.wgmma(sums, x_part.transpose((1, 0)), dy_part)

            def store(sums):
                def target(r, c):
                    return dw.at[e, pl.ds(top + r, SQUARE), pl.ds(left + c, SQUARE)]

                ring.store_squares(sums.astype(dw.dtype), out, tiles, target)

            return table[2, g], multiply, store

        ring.run(full, empty, tiles, jnp.int32(units), loads, products)

    out_type = jax.ShapeDtypeStruct((E, D, F), x_ND.dtype)
    a_shape, b_shape = (DEPTH, tiles.rows), (DEPTH, tiles.cols)
    out = ring.staging(x_ND.dtype)
    kernel = ring.launch(body, units, out_type, tiles, x_ND.dtype, a_shape, b_shape, out)
    return kernel(table, x_ND, dy_NF)


def longest_first(table: jax.Array, steps_E: jax.Array) -> jax.Array:
    """Sort the columns by steps, so that blocks work on units of similar length at a time."""
    e = jnp.arange(steps_E.shape[0])
    before = (steps_E > steps_E[:, None]) | ((steps_E == steps_E[:, None]) & (e < e[:, None]))
    place_E = before.sum(1, dtype=jnp.int32)
    return jnp.where(place_E == e[:, None], table[:, None], 0).sum(2, dtype=jnp.int32)


def _keep_rows(part, first, last) -> None:
    """Zero all rows but [first, last); multipliers that share a part write the same values."""
    row = lax.broadcasted_iota(jnp.int32, (DEPTH, SQUARE), 0)
    row = plgpu.layout_cast(row, plgpu.Layout.WGMMA)
    for col in range(0, part.shape[1], SQUARE):
        square = part.at[:, col : col + SQUARE]
        value = square[...]
        square[...] = jnp.where((row >= first) & (row < last), value, jnp.zeros_like(value))
