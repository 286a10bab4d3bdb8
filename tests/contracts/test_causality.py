"""Tokens after position t never change an output up to t: not by a value, not by a bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.errors import UserError
from moe_jax.model.config import ModelConfig
from moe_jax.model.define import define
from moe_jax.model.forward import forward
from moe_jax.model.initialize import init
from moe_jax.moe.config import MoEConfig
from moe_jax.moe.dispatch import DISPATCH
from moe_jax.moe.layer import MoE
from moe_jax.moe.types import MoEContext

B, T, D, E = 8, 16, 16, 8
ROWS = 4  # several rows share a group's slots


def config(dispatch: str, priority: str) -> ModelConfig:
    """Two MoE layers; a capacity at which most experts overflow."""
    moe = MoEConfig(
        num_experts=E,
        expert_width=12,
        router="top_k",
        top_k=3,
        dispatch=dispatch,
        priority=priority,
        capacity_factor=0.6,
    )
    return ModelConfig(
        vocab_size=50,
        num_layers=2,
        width=D,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        ffn_width=16,
        moe=moe,
    )


def context(mesh) -> MoEContext:
    return MoEContext(
        token_ids_BT=jnp.zeros((B, T), jnp.int32),
        mask_BT=jnp.ones((B, T), bool),
        row_keys_B=jax.random.split(jax.random.key(1), B),
        mesh=mesh,
        group_rows=ROWS,
        train=True,
    )


def one_layer(config: ModelConfig, mesh):
    """(inputs [seed] -> x_BTD, x_BTD -> (y_BTD, aux))."""
    layer = MoE(
        config.moe,
        config.width,
        activation=config.activation,
        depth=config.num_layers,
        dtype=jnp.float32,
        rngs=nnx.Rngs(params=0),
    )
    graph, state = nnx.split(layer)
    kernel = np.random.default_rng(0).normal(size=(D, E)).astype(np.float32)
    state["router_kernel"].set_value(jnp.asarray(kernel))

    @jax.jit
    def run(x_BTD):
        return nnx.merge(graph, state)(x_BTD, context(mesh))

    return lambda seed: jax.random.normal(jax.random.key(seed), (B, T, D)), run


def whole_model(config: ModelConfig, mesh):
    """(inputs [seed] -> tokens_BT, tokens_BT -> (hidden_BTD, aux))."""
    model = define(config, jnp.float32)
    params = jax.jit(functools.partial(init, model))(jax.random.key(0))
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    segments = jnp.ones((B, T), jnp.int32)

    @jax.jit
    def run(tokens_BT):
        return forward(model, params, tokens_BT, positions, segments, context(mesh))

    return lambda seed: jax.random.randint(jax.random.key(seed), (B, T), 0, 50), run


def leaks(make, config: ModelConfig, mesh) -> int:
    """Earlier outputs that changed with later tokens, over several borders t."""
    inputs, run = make(config, mesh)
    before, after = inputs(2), inputs(3)
    y, aux = run(before)
    if config.moe.dispatch in ("capacity", "einsum"):
        assert (aux.stats.fates.dropped_capacity > 0.2 * aux.stats.assignments).all()
    changed = 0
    for t in (1, T // 2, T - 1):
        later, _ = run(before.at[:, t:].set(after[:, t:]))
        differs_BT = (np.asarray(later) != np.asarray(y)).any(-1)
        changed += int(differs_BT[:, :t].sum())
        assert t > 1 or differs_BT[:, t:].sum() > B  # the change did reach the layer
    return changed


@pytest.mark.parametrize("dispatch", DISPATCH)
def test_a_layer_is_causal_with_token_priority(dispatch, mesh_of):
    assert leaks(one_layer, config(dispatch, "token"), mesh_of()) == 0


@pytest.mark.parametrize("dispatch", ["capacity", "einsum"])
@pytest.mark.parametrize("priority", ["choice", "batch"])
def test_other_priorities_are_not(dispatch, priority, mesh_of):
    """The control: a later token's choice evicts an earlier token's."""
    assert leaks(one_layer, config(dispatch, priority), mesh_of()) > 10


@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
def test_the_whole_model_is_causal(dispatch, mesh_of):
    assert leaks(whole_model, config(dispatch, "token"), mesh_of()) == 0


def test_the_whole_model_with_choice_priority_is_not(mesh_of):
    assert leaks(whole_model, config("capacity", "choice"), mesh_of()) > 10


def test_the_whole_model_with_batch_priority_is_refused(mesh_of):
    with pytest.raises(UserError, match="see the future: use priority token"):
        whole_model(config("capacity", "batch"), mesh_of())
