"""The kernels of weight * silu(gate) * up and its gradients, which read each operand once.

One block computes one row, in registers.  Rows >= `used` are padding: neither read nor written.

Axes: N rows, F columns, H = 2*F columns of gate and up (gate first), C columns read at once.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32, Int32

from moe_jax.ops.mosaic.rows import chunk_of, read


def swiglu(
    h_NH: BFloat16[Array, "N H"], weights_N: Float32[Array, "N"], used_1: Int32[Array, "1"]
) -> BFloat16[Array, "N F"]:
    """The weighted activation; F = H / 2 must be a multiple of rows.THREADS."""
    N, F = h_NH.shape[0], h_NH.shape[1] // 2
    chunk = chunk_of(F)

    def body(h, weights, used, a):
        n = lax.axis_index("row")

        @pl.when(n < used[0])
        def _():
            weight = weights[n]
            for first in range(0, F, chunk):
                gate_C, up_C = (
                    read(h, n, begin, chunk).astype(jnp.float32) for begin in (first, F + first)
                )
                a_C = gate_C / (1 + jnp.exp(-gate_C)) * up_C * weight
                a[n, pl.ds(first, chunk)] = a_C.astype(a.dtype)

    made = jax.ShapeDtypeStruct((N, F), h_NH.dtype)
    kernel = plgpu.kernel(body, out_type=made, grid=(N,), grid_names=("row",))
    return kernel(h_NH, weights_N, used_1)


def swiglu_gradient(
    da_NF: BFloat16[Array, "N F"],
    h_NH: BFloat16[Array, "N 2*F"],
    weights_N: Float32[Array, "N"],
    used_1: Int32[Array, "1"],
) -> tuple[BFloat16[Array, "N 2*F"], Float32[Array, "N"]]:
    """The gradients (dh, dweights) of `swiglu`."""
    N, F = da_NF.shape
    chunk = chunk_of(F)

    def body(da, h, weights, used, dh, dweights):
        n = lax.axis_index("row")

        @pl.when(n < used[0])
        def _():
            weight, total = weights[n], jnp.float32(0)
            for first in range(0, F, chunk):
                da_C, gate_C, up_C = (
                    read(ref, n, begin, chunk).astype(jnp.float32)
                    for ref, begin in ((da, first), (h, first), (h, F + first))
                )
                sigmoid_C = 1 / (1 + jnp.exp(-gate_C))
                silu_C = gate_C * sigmoid_C
                total += jnp.sum(da_C * silu_C * up_C)
                da_C = da_C * weight
                dgate_C = da_C * up_C * (sigmoid_C + silu_C * (1 - sigmoid_C))
                dh[n, pl.ds(first, chunk)] = dgate_C.astype(dh.dtype)
                dh[n, pl.ds(F + first, chunk)] = (da_C * silu_C).astype(dh.dtype)
            dweights[n] = total

    made = jax.ShapeDtypeStruct(h_NH.shape, h_NH.dtype), jax.ShapeDtypeStruct((N,), jnp.float32)
    kernel = plgpu.kernel(body, out_type=made, grid=(N,), grid_names=("row",))
    return kernel(da_NF, h_NH, weights_N, used_1)
