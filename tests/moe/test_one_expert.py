"""A layer with one expert is the dense FFN with that expert's weights: outputs and gradients.

Axes: B rows, T positions, D width, F hidden width, U matrices of the expert's first layer.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.moe.config import MoEConfig
from moe_jax.moe.dispatch import DISPATCH
from moe_jax.moe.layer import MoE
from moe_jax.nn.ffn import DenseFFN

B, T, D, F = 2, 6, 8, 12


def twins(dispatch: str, activation: str) -> tuple[MoE, DenseFFN]:
    """A layer with one expert, and the dense FFN with its weights."""
    config = MoEConfig(
        num_experts=1,
        top_k=1,
        expert_width=F,
        router="switch",
        dispatch=dispatch,
        capacity_factor=1.0,
        expert_init_scale=0.5,  # the twins share values, whatever these are
        options={"switch": {"jitter": 0.0}},
    )
    given = {"activation": activation, "dtype": jnp.float64}
    moe = MoE(config, D, rngs=nnx.Rngs(0), **given)
    dense = DenseFFN(D, F, depth=1, rngs=nnx.Rngs(1), **given)
    w_in_DUF = moe.w_in_EDUF[...][0]
    dense.w_in_DF.set_value(w_in_DUF[:, -1])  # gate first, then up
    if activation == "swiglu":
        dense.w_gate_DF.set_value(w_in_DUF[:, 0])
    dense.w_out_FD.set_value(moe.w_out_EFD[...][0])
    return moe, dense


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("dispatch", DISPATCH)
def test_one_expert_is_the_dense_layer(x64, dispatch, activation):
    moe, dense = twins(dispatch, activation)
    x_BTD = jax.random.normal(jax.random.key(0), (B, T, D), jnp.float64)
    dy_BTD = jax.random.normal(jax.random.key(1), (B, T, D), jnp.float64)

    def loss(layer, x_BTD):
        out = layer(x_BTD)
        y_BTD = out[0] if isinstance(out, tuple) else out
        return (y_BTD * dy_BTD).sum(), y_BTD

    grad = nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, sparse_BTD), (sparse, sparse_dx) = grad(moe, x_BTD)
    (_, dense_BTD), (expected, dense_dx) = grad(dense, x_BTD)
    np.testing.assert_allclose(sparse_BTD, dense_BTD, rtol=0, atol=1e-13)
    np.testing.assert_allclose(sparse_dx, dense_dx, rtol=0, atol=1e-13)
    found_DUF = sparse["w_in_EDUF"][...][0]
    np.testing.assert_allclose(found_DUF[:, -1], expected["w_in_DF"][...], rtol=0, atol=1e-12)
    if activation == "swiglu":
        np.testing.assert_allclose(found_DUF[:, 0], expected["w_gate_DF"][...], rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        sparse["w_out_EFD"][...][0], expected["w_out_FD"][...], rtol=0, atol=1e-12
    )
    # One probability is always 1, so the language-model loss moves no router.
    assert not np.any(np.asarray(sparse["router_kernel"][...]))
