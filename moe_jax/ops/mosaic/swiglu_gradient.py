"""Gradients of weight * silu(gate) * up in one reading: a block a row, all of it in registers.

Axes: N rows, F columns.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32

THREADS = 128  # of a warpgroup
CHUNK = 8 * THREADS  # columns that a block reads at once: 16 bytes a thread


def swiglu_gradient(
    da_NF: BFloat16[Array, "N F"], h_NH: BFloat16[Array, "N 2*F"], weights_N: Float32[Array, "N"]
) -> tuple[BFloat16[Array, "N 2*F"], Float32[Array, "N"]]:
    """(dh, dweights); gate stands before up.  F is a multiple of THREADS."""
    N, F = da_NF.shape
    chunk = min(CHUNK, F & -F)  # the largest power of two that divides F

    def body(da, h, weights, dh, dweights):
        n = lax.axis_index("row")
        # As many columns a thread as one load takes; the default layout has half of that.
        layout = plgpu.Layout.WG_STRIDED((chunk,), vec_size=chunk // THREADS)

        def read(ref, first):
            source = ref.at[n, pl.ds(first, chunk)]
            # pyright reads jax 0.10's signature; the kernels run from 0.11 on.
            loaded_C = plgpu.load(source, layout=layout, optimized=False)  # pyright: ignore[reportCallIssue]
            return loaded_C.astype(jnp.float32)

        weight, total = weights[n], jnp.float32(0)
        for first in range(0, F, chunk):
            da_C, gate_C, up_C = read(da, first), read(h, first), read(h, F + first)
            sigmoid_C = 1 / (1 + jnp.exp(-gate_C))
            silu_C = gate_C * sigmoid_C
            total += jnp.sum(da_C * silu_C * up_C)
            da_C = da_C * weight
            dgate_C = da_C * up_C * (sigmoid_C + silu_C * (1 - sigmoid_C))
            dh[n, pl.ds(first, chunk)] = dgate_C.astype(dh.dtype)
            dh[n, pl.ds(F + first, chunk)] = (da_C * silu_C).astype(dh.dtype)
        dweights[n] = total

    made = jax.ShapeDtypeStruct(h_NH.shape, h_NH.dtype), jax.ShapeDtypeStruct((N,), jnp.float32)
    return plgpu.kernel(body, out_type=made, grid=(N,), grid_names=("row",))(da_NF, h_NH, weights_N)
