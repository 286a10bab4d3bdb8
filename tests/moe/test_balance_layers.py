"""How the balance losses of several layers become one, against NumPy.

Axes: L layers, S tokens, E experts, K assignments per token.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.errors import UserError
from moe_jax.moe.balance import aux_loss, aux_means
from moe_jax.moe.config import MoEConfig
from moe_jax.moe.layer import MoE

L, B, T, D, E, K = 3, 4, 8, 12, 4, 2


def layers(layers_as: str, router: str = "top_k"):
    """The MoEAux of L layers, stacked, with the probabilities and the ids of each, in NumPy."""
    config = MoEConfig(
        num_experts=E,
        top_k=K,
        expert_width=8,
        router=router,
        balance_layers=layers_as,
        balance_scope="global",
        capacity_factor=float(E),
    )
    found, probs_LSE, ids_LSK = [], [], []
    for layer in range(L):
        moe = MoE(config, D, rngs=nnx.Rngs(layer))
        kernel = np.random.default_rng(layer).normal(size=(D, E))
        moe.router_kernel.set_value(jnp.asarray(kernel, jnp.float32))
        x_BTD = 1 + jax.random.normal(jax.random.key(layer), (B, T, D))  # not balanced
        found.append(moe(x_BTD)[1])
        logits = np.asarray(x_BTD, np.float64).reshape(-1, D) @ kernel
        exp = np.exp(logits - logits.max(-1, keepdims=True))
        probs_LSE.append(exp / exp.sum(-1, keepdims=True))
        ids_LSK.append(np.argsort(-logits, -1)[:, :K])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
    return config, stacked, np.array(probs_LSE), np.array(ids_LSK)


def by_layer(probs_LSE, ids_LSK):
    """E sum_e f_e P_e of each layer."""
    f_LE = np.array([np.bincount(ids.reshape(-1), minlength=E) / ids.size for ids in ids_LSK])
    return E * (f_LE * probs_LSE.mean(1)).sum(1)


@pytest.mark.parametrize("layers_as", ["mean", "sum"])
def test_mean_and_sum(layers_as):
    config, aux, probs_LSE, ids_LSK = layers(layers_as)
    expected = getattr(np, layers_as)(by_layer(probs_LSE, ids_LSK))
    found = aux_means(aux, layers=config.balance_layers).balance
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_pooled_is_the_loss_of_hugging_face_divided_by_k():
    """Hugging Face concatenates the layers' tokens and sums over the K choices, without 1 / K."""
    config, aux, probs_LSE, ids_LSK = layers("pooled")
    chosen_NKE = np.eye(E)[ids_LSK.reshape(-1, K)]
    theirs = E * (chosen_NKE.mean(0) * probs_LSE.reshape(-1, E).mean(0)).sum()
    found = aux_means(aux, layers="pooled").balance
    np.testing.assert_allclose(found, theirs / K, rtol=1e-5)
    assert abs(theirs / K - by_layer(probs_LSE, ids_LSK).mean()) > 0.01  # the forms differ
    weighted = config.balance_weight * found + config.z_weight * aux_means(aux).z
    np.testing.assert_allclose(aux_loss(aux, config), weighted, rtol=1e-6)


def test_pooled_losses_of_two_microbatches_are_weighted_by_their_tokens():
    _, aux, *_ = layers("pooled")
    one, tokens = aux_means(aux, layers="pooled").balance, B * T
    part = aux_means(aux, jnp.float32(4 * tokens), layers="pooled").balance
    np.testing.assert_allclose(part, one / 4, rtol=1e-6)


def test_a_router_without_probabilities_is_refused():
    _, aux, *_ = layers("mean")
    with pytest.raises(UserError, match="balance_layers is pooled, but this router"):
        aux_means(aux, layers="pooled")


def test_kept_weight_and_the_scale_of_a_layer_alone():
    _, aux, *_ = layers("mean")
    assert aux.scale is None
    np.testing.assert_allclose(aux.stats.kept_weight_sum, [B * T] * L, rtol=1e-6)  # renormalized
    assert np.asarray(aux.stats.outcomes.kept).tolist() == [B * T * K] * L
