"""The layer called with plain tokens: defaults, other people's meshes, and what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import moe_jax
from moe_jax.errors import UserError
from moe_jax.parallel.collectives import partitioned

WIDTH = 16


def config(**knobs):
    return moe_jax.MoEConfig(**{"num_experts": 8, "top_k": 2, "expert_width": 8, **knobs})


def layer(**knobs):
    return moe_jax.MoE(config(**knobs), WIDTH, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def x_BTD():
    return jax.random.normal(jax.random.key(0), (8, 12, WIDTH))


@pytest.mark.parametrize("dispatch", ["capacity", "dropless", "dense", "einsum"])
def test_it_gives_the_same_without_a_mesh_and_on_a_mesh_of_the_callers(dispatch, x_BTD):
    """One device, a caller's mesh of eight with another name, and ours with experts sharded."""
    moe = layer(dispatch=dispatch, group_rows=1)
    graph, state = nnx.split(moe)

    def loss(state, x_BTD, mesh=None):
        y_BTD, aux = nnx.merge(graph, state)(x_BTD, mesh=mesh)
        return (y_BTD**2).mean() + moe_jax.aux_loss(aux, config()), y_BTD

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)
    (_, alone), grads = step(state, x_BTD)
    theirs = jax.make_mesh((8,), ("dp",), axis_types=(AxisType.Auto,))
    x_there = jax.device_put(x_BTD, NamedSharding(theirs, P("dp")))
    ours = moe_jax.make_mesh(moe_jax.MeshConfig(data=2, expert=4))
    for given, mesh in ((x_there, None), (x_BTD, ours)):
        (_, y_BTD), there = step(state, given, mesh)
        np.testing.assert_allclose(y_BTD, alone, atol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), there, grads)


def test_a_mesh_that_was_set_is_used_if_it_is_ours(x_BTD):
    moe = layer(group_rows=1)
    plain = jax.jit(lambda x: moe(x)[0])(x_BTD)
    ours = moe_jax.make_mesh(moe_jax.MeshConfig(data=1, expert=8))
    with jax.set_mesh(ours):
        lowered = jax.jit(lambda x: moe(x)[0]).lower(x_BTD)
        sharded = lowered.compile()(x_BTD)
    assert "all_to_all" in lowered.as_text()
    np.testing.assert_allclose(sharded, plain, atol=1e-6)


def test_own_kernels_run_only_where_xla_splits_nothing(mesh_of):
    assert partitioned()  # eight devices, no shard_map
    seen = []

    def body(x):
        seen.append(partitioned())
        return x

    split = P("data")
    jax.jit(jax.shard_map(body, mesh=mesh_of(data=8), in_specs=split, out_specs=split))(jnp.ones(8))
    assert seen == [False]


def test_modes_follow_the_module_and_the_call(x_BTD):
    moe = layer(router="gshard", group_rows=1)
    with pytest.raises(UserError, match="pass key=, or deterministic=True"):
        moe(x_BTD)
    key = jax.random.key(1)
    noisy, evaluated = moe(x_BTD, key=key)[0], moe(x_BTD, deterministic=True)[0]
    assert (np.asarray(noisy) != np.asarray(evaluated)).any()
    moe.eval()
    np.testing.assert_array_equal(moe(x_BTD)[0], evaluated)
    moe.train()
    np.testing.assert_array_equal(moe(x_BTD, key=key)[0], noisy)


def test_mistakes_are_one_sentence(x_BTD, mesh_of):
    with pytest.raises(UserError, match=r"MoE got 6 rows, which group_rows \(4\) does not divide"):
        layer(group_rows=4)(x_BTD[:6])
    with pytest.raises(UserError, match=r"pass \[rows, tokens, 16\]"):
        layer()(x_BTD[..., :4])
    with pytest.raises(UserError, match=r"has axes \('data',\) but expert parallelism needs"):
        layer()(x_BTD, mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)))
    with pytest.raises(UserError, match=r"sigmoid_bias keeps state: pass router_state="):
        layer(router="sigmoid_bias")(x_BTD)
    with pytest.raises(UserError, match="expert_dropout draws in training"):
        layer(expert_dropout=0.1)(x_BTD)
    explicit = jax.make_mesh((8,), ("dp",), axis_types=(AxisType.Explicit,))
    with pytest.raises(UserError, match=r"Explicit axes \(dp\): make it with axis_types"):
        layer()(jax.device_put(x_BTD, NamedSharding(explicit, P("dp"))))
    with pytest.raises(UserError, match="8 devices: pass a multiple of 8 rows"):
        layer()(x_BTD[:6], mesh=mesh_of(data=8))
    with pytest.raises(UserError, match="activation 'relu6' is unknown"):
        moe_jax.MoE(config(), WIDTH, activation="relu6", rngs=nnx.Rngs(0))


def test_padding_gets_zero_and_no_slot(x_BTD):
    mask_BT = jnp.arange(12) < 5
    mask_BT = jnp.broadcast_to(mask_BT, (8, 12))
    y_BTD, aux = layer(group_rows=1)(x_BTD, mask_BT=mask_BT)
    assert not np.asarray(y_BTD)[:, 5:].any()
    assert int(aux.load_E.sum()) == 8 * 5 * 2
