"""The whole layer: shared experts, expert dropout, and experts with and without a gate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.moe.config import MoEConfig
from moe_jax.moe.layer import MoE
from moe_jax.moe.types import MoEContext


def layer(mesh, dispatch="capacity", activation="swiglu", shared=0, dropout=0.0, train=True):
    """The module in float64, without drops, and apply(x_BTD, order of the rows' keys)."""
    moe = MoEConfig(
        num_experts=4,
        top_k=2,
        expert_width=6,
        dispatch=dispatch,
        capacity_factor=4.0,
        shared_experts=shared,
        expert_dropout=dropout,
    )
    module = MoE(moe, 8, activation=activation, depth=4, dtype=jnp.float64, rngs=nnx.Rngs(params=0))
    keys = jax.vmap(jax.random.key)(jnp.arange(2))

    graph, params = nnx.split(module)

    @jax.jit
    def forward(params, x_BTD, keys_B):
        tokens, mask = jnp.zeros((2, 5), jnp.int32), jnp.ones((2, 5), bool)
        context = MoEContext(tokens, mask, keys_B, mesh, train, group_rows=1)
        return nnx.merge(graph, params)(x_BTD, context)[0]

    def apply(x_BTD, order=(0, 1)):
        return forward(params, x_BTD, keys[jnp.array(order)])

    return module, apply


def by_hand(module, x_BTD):
    """The layer in NumPy: a softmax router, renormalised top-2, and GELU or SwiGLU experts."""
    x_ND = np.asarray(x_BTD).reshape(-1, x_BTD.shape[-1])
    logits = x_ND @ np.asarray(module.router_kernel[...])
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    w_in, w_out = np.asarray(module.w_in_EDUF[...]), np.asarray(module.w_out_EFD[...])
    y_ND = np.zeros_like(x_ND)
    for n, x in enumerate(x_ND):
        best = np.argsort(-probs[n])[:2]
        for e in best:
            h = np.einsum("d,duf->uf", x, w_in[e])
            gated = h[0] / (1 + np.exp(-h[0])) * h[1] if len(h) == 2 else np.asarray(_gelu(h[0]))
            y_ND[n] += probs[n, e] / probs[n, best].sum() * gated @ w_out[e]
    return y_ND.reshape(x_BTD.shape)


def _gelu(h):
    return 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("dispatch", ["dense", "einsum", "capacity", "dropless"])
def test_against_numpy(x64, mesh_of, dispatch, activation):
    module, apply = layer(mesh_of(), dispatch, activation)
    x_BTD = jax.random.normal(jax.random.key(1), (2, 5, 8), jnp.float64)
    assert np.allclose(apply(x_BTD), by_hand(module, x_BTD), atol=1e-12)


def test_shared_experts_are_added_and_learn(x64, mesh_of):
    module, apply = layer(mesh_of(), shared=2)
    x_BTD = jax.random.normal(jax.random.key(1), (2, 5, 8), jnp.float64)
    assert module.shared.w_in_DF.shape == (8, 12)
    expected = by_hand(module, x_BTD) + np.asarray(module.shared(x_BTD))
    assert np.allclose(apply(x_BTD), expected, atol=1e-12)
    graph, params = nnx.split(module)
    context_free = jax.grad(lambda p: (nnx.merge(graph, p).shared(x_BTD) ** 2).sum())(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(context_free["shared"]))


def test_expert_dropout(x64, mesh_of):
    """Dropout zeroes or scales the routed experts' output, not that of shared experts."""
    rate = 0.25
    x_BTD = jax.random.normal(jax.random.key(1), (2, 5, 8), jnp.float64)
    plain = layer(mesh_of())[1](x_BTD)
    dropped = layer(mesh_of(), dropout=rate)[1](x_BTD)
    gone = np.asarray(dropped == 0)
    assert 8 <= gone.sum() <= 32  # of 80: six sigma around 20
    assert np.allclose(dropped, np.where(gone, 0, plain / (1 - rate)), atol=1e-12)

    # A row's mask depends on its key, not on its index.
    turned = layer(mesh_of(), dropout=rate)[1](x_BTD[::-1], (1, 0))
    np.testing.assert_array_equal(turned[::-1], dropped)
    assert (np.asarray(dropped[0] == 0) != np.asarray(dropped[1] == 0)).any()

    assert np.array_equal(layer(mesh_of(), dropout=rate, train=False)[1](x_BTD), plain)
    with_shared = layer(mesh_of(), shared=1)[1](x_BTD) - plain
    both = layer(mesh_of(), shared=1, dropout=rate)[1](x_BTD)
    assert np.allclose(both - dropped, with_shared, atol=1e-12)
