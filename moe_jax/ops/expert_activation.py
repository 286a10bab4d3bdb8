"""Between an expert's two matmuls: the activation, and the weight with which a row is combined.

A token's output is the sum over its experts of weight * (act(h) @ w_out).  The weight commutes with
the second matmul, and here it is taken before it: its gradient, <da, act(h)>, then falls out of the
activation's own backward pass, where it would otherwise be <dy, y>, for which all outputs y would
have to be kept, or computed and sent home once more, and read again.

Axes: N rows, F columns of the hidden layer, U factors of it side by side (gate first, then up).

XLA runs the backward pass as two kernels that read the same operands (0.52 ms for 131072 rows of
1024 on an H200, 0.91 for 32768 of 7168).  For SwiGLU on a Hopper GPU a kernel of moe_jax/ops/mosaic
makes both results from one reading (0.34 and 0.59; without the weights 0.33 and 0.59).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.ops.mosaic import choose
from moe_jax.parallel.collectives import varying_like


def _swiglu(gate, up):
    return jax.nn.silu(gate) * up


# name -> (U, function of U tensors of one shape)
ACTIVATE = {"gelu": (1, jax.nn.gelu), "swiglu": (2, _swiglu)}


def activate(name: str, h_NH: Float[Array, "*N H"]) -> Float[Array, "*N F"]:
    """The activation `name` of ACTIVATE; H = U * F."""
    U, function = ACTIVATE[name]
    # The transpose of `split` is a concatenation, that of slices pads.
    return function(*jax.lax.split(h_NH, [h_NH.shape[-1] // U] * U, axis=h_NH.ndim - 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def weighted_activate(
    name: str, h_NH: Float[Array, "*N H"], weights_N: Float[Array, "*N"], kernel: bool = True
) -> Float[Array, "*N F"]:
    """weights_N * `activate`; computed in float32 or wider and rounded once.

    Without `kernel` the backward pass is XLA's in any case, which takes in what makes its operands.
    """
    del kernel
    return _weighted(name, h_NH, weights_N)


def _weighted(name, h_NH, weights_N):
    wide_NH = h_NH.astype(jnp.promote_types(h_NH.dtype, jnp.float32))
    return (activate(name, wide_NH) * weights_N[..., None]).astype(h_NH.dtype)


def _save(name, h_NH, weights_N, kernel):
    del kernel
    return _weighted(name, h_NH, weights_N), (h_NH, weights_N)


def _backward(name, kernel, saved, da_NF):
    h_NH, weights_N = saved
    fast = {"cuda": _mosaic_backward} if kernel and supports(name, h_NH, weights_N) else {}
    plain = functools.partial(plain_backward, name)
    return jax.lax.platform_dependent(da_NF, h_NH, weights_N, **fast, default=plain)


weighted_activate.defvjp(_save, _backward)


def plain_backward(name: str, da_NF, h_NH, weights_N):
    """(dh, dweights) by automatic differentiation."""
    return jax.vjp(functools.partial(_weighted, name), h_NH, weights_N)[1](da_NF)


def supports(name: str, h_NH: jax.Array, weights_N: jax.Array) -> bool:
    """Whether the kernel takes these operands and the process has a GPU that runs it."""
    columns = 2 * choose.NARROW
    narrow = h_NH.dtype == jnp.bfloat16 and weights_N.dtype == jnp.float32
    return name == "swiglu" and narrow and h_NH.shape[-1] % columns == 0 and choose.runs_here()


def _mosaic_backward(da_NF, h_NH, weights_N):
    """As `plain_backward`; imported where it runs, and it declares no varying axes."""
    from moe_jax.ops.mosaic.swiglu_gradient import swiglu_gradient

    rows = da_NF.reshape(-1, da_NF.shape[-1]), h_NH.reshape(-1, h_NH.shape[-1])
    dh_NH, dweights_N = swiglu_gradient(*rows, weights_N.reshape(-1))
    found = dh_NH.reshape(h_NH.shape), dweights_N.reshape(weights_N.shape)
    return varying_like(found[0], da_NF), varying_like(found[1], da_NF)
