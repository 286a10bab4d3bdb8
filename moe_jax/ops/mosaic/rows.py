"""Reads rows by a block of one warpgroup, with 16 bytes per thread at once."""

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

THREADS = 128  # per warpgroup
CHUNK = 8 * THREADS  # columns in bfloat16 that a block reads at once


def chunk_of(columns: int) -> int:
    """The largest power of two, up to CHUNK, that divides `columns`, a multiple of THREADS."""
    return min(CHUNK, columns & -columns)


def read(ref, row: jax.Array, first: int, chunk: int) -> jax.Array:
    """Read ref[row, first : first + chunk] into registers."""
    # One load per thread.  With the default layout each thread would need two loads.
    layout = plgpu.Layout.WG_STRIDED((chunk,), vec_size=chunk // THREADS)
    source = ref.at[row, pl.ds(first, chunk)]
    # pyright checks jax 0.10's signature; the kernels run from 0.11 on.
    return plgpu.load(source, layout=layout, optimized=False)  # pyright: ignore[reportCallIssue]
