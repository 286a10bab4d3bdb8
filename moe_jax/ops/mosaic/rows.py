"""How a block of one warpgroup reads rows: as many columns at once as make 16 bytes a thread."""

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

THREADS = 128  # of a warpgroup
CHUNK = 8 * THREADS  # columns in bfloat16 that a block reads at once


def chunk_of(columns: int) -> int:
    """The largest power of two, up to CHUNK, that divides `columns`, a multiple of THREADS."""
    return min(CHUNK, columns & -columns)


def read(ref, row: jax.Array, first: int, chunk: int) -> jax.Array:
    """ref[row, first : first + chunk] in registers."""
    # As many columns a thread as one load takes; the default layout has half of that.
    layout = plgpu.Layout.WG_STRIDED((chunk,), vec_size=chunk // THREADS)
    source = ref.at[row, pl.ds(first, chunk)]
    # pyright reads jax 0.10's signature; the kernels run from 0.11 on.
    return plgpu.load(source, layout=layout, optimized=False)  # pyright: ignore[reportCallIssue]
