"""The layer called alone, with plain tokens: defaults, callers' meshes and bad arguments."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import moe_jax
from moe_jax.errors import UserError
from moe_jax.moe.call import check_call
from moe_jax.moe.components import Components
from moe_jax.moe.dispatch.capacity import Capacity
from moe_jax.moe.dispatch.dense import Dense
from moe_jax.moe.routers.expert_choice import ExpertChoiceRouter
from moe_jax.moe.routers.sigmoid_bias import SigmoidBias
from moe_jax.moe.routers.top_k import TopK
from moe_jax.parallel.collectives import partitioned
from moe_jax.parallel.mesh import AXES

WIDTH = 16


def config(**knobs):
    return moe_jax.MoEConfig(**{"num_experts": 8, "top_k": 2, "expert_width": 8, **knobs})


def layer(**knobs):
    return moe_jax.MoE(config(**knobs), WIDTH, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def x_BTD():
    return jax.random.normal(jax.random.key(0), (8, 12, WIDTH))


@pytest.mark.parametrize(
    "dispatch",
    [
        "capacity",
        *(pytest.param(n, marks=pytest.mark.lifecycle) for n in ("dropless", "dense", "einsum")),
    ],
)
def test_it_gives_the_same_without_a_mesh_and_on_a_mesh_of_the_callers(dispatch, x_BTD):
    """On one device, on a caller's mesh with other axis names, and on ours with expert shards."""
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
    with pytest.raises(UserError, match=r"pass floats of shape \[rows, tokens, 16\]"):
        layer()(x_BTD[..., :4])
    with pytest.raises(UserError, match=r"has axes \('data',\) but expert parallelism needs"):
        layer()(x_BTD, mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)))
    with pytest.raises(UserError, match=r"sigmoid_bias keeps state: pass router_state="):
        layer(router="sigmoid_bias")(x_BTD)
    with pytest.raises(UserError, match="expert_dropout samples in training"):
        layer(expert_dropout=0.1)(x_BTD)
    with pytest.raises(UserError, match="8 devices: pass a multiple of 8 rows"):
        layer()(x_BTD[:6], mesh=mesh_of(data=8))
    with pytest.raises(UserError, match=r"expert=4, which does not divide experts \(6\)"):
        layer(num_experts=6)(x_BTD, mesh=mesh_of(expert=4))
    with pytest.raises(UserError, match=r"tensor=2, which does not divide expert_width \(9\)"):
        layer(expert_width=9)(x_BTD, mesh=mesh_of(tensor=2))
    with pytest.raises(UserError, match="activation 'relu6' is unknown"):
        moe_jax.MoE(config(), WIDTH, activation="relu6", rngs=nnx.Rngs(0))


def unchecked(method):
    """A method as users call it, without the signature checks of the test suite."""
    return inspect.unwrap(method)


def context(**fields):
    """A context of 8 rows of 12 tokens, with other `fields`."""
    values = {
        "token_ids_BT": jnp.zeros((8, 12), jnp.int32),
        "mask_BT": jnp.ones((8, 12), bool),
        "row_keys_B": jax.random.split(jax.random.key(0), 8),
        "mesh": None,
        "train": False,
    }
    return moe_jax.MoEContext(**{**values, **fields})


KEY, BOOLS = jax.random.key(0), jnp.ones((8, 12), bool)
BAD_ARGUMENTS = [
    (lambda: {"mask_BT": BOOLS[0]}, r"mask_BT is bool\[12\]: pass bools of shape \[8, 12\]"),
    (lambda: {"mask_BT": jnp.ones((8, 12))}, r"mask_BT is float32\[8, 12\]: pass bools"),
    (lambda: {"token_ids_BT": jnp.ones((8, 1), int)}, r"token_ids_BT is int32\[8, 1\]"),
    (lambda: {"key": jax.random.PRNGKey(0)}, "pass keys of jax.random.key"),
    (lambda: {"key": jax.random.split(KEY, 8)}, r"key is key<fry>\[8\]: .* shape \[\]"),
    (lambda: {"router_state": {"bias": jnp.ones(8)}}, "has bias: pass no router_state"),
    (lambda: {"context": context(mask_BT=BOOLS[:4])}, r"mask_BT is bool\[4, 12\]"),
    (lambda: {"context": context(row_keys_B=jax.random.split(KEY, 4))}, "row_keys_B is key"),
    (lambda: {"context": context(sources_BT=jnp.zeros((8, 1), int))}, "sources_BT is int32"),
    (lambda: {"context": context(mask_BT=[[True]])}, "mask_BT is a list: pass bools"),
    (lambda: {"context": context(router_state=jnp.ones(8))}, r"router_state is float32\[8\]"),
    (
        lambda: {"context": context(mesh=moe_jax.MeshConfig())},
        "mesh is a MeshConfig: pass the result",
    ),
    (lambda: {"context": context(), "mask_BT": BOOLS}, "context= replaces mask_BT="),
    (lambda: {"context": context(), "deterministic": False}, "replaces deterministic="),
]


@pytest.mark.parametrize(("make", "sentence"), BAD_ARGUMENTS)
def test_an_argument_that_does_not_fit_is_refused(make, sentence, x_BTD):
    with pytest.raises(UserError, match=sentence):
        unchecked(moe_jax.MoE.__call__)(layer(), x_BTD, **make())


def test_a_mask_in_the_place_of_the_context_is_refused(x_BTD):
    with pytest.raises(
        UserError, match=r"context is bool\[8, 12\]: pass a MoEContext, or mask_BT="
    ):
        unchecked(check_call)(x_BTD, BOOLS, None)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x: x.astype(int), r"MoE got x int32\[8, 12, 16\]: pass floats"),
        (lambda x: x[:0], r"float32\[0, 12, 16\]: pass at least one row of one token"),
        (lambda x: x[:, :0], "pass at least one row of one token"),
        (lambda x: x.tolist(), "MoE got x a list: pass floats"),
        (lambda x: x[0], r"pass floats of shape \[rows, tokens, 16\]"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(change, sentence, x_BTD):
    with pytest.raises(UserError, match=sentence):
        unchecked(moe_jax.MoE.__call__)(layer(), change(x_BTD))


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({"bais": jnp.zeros(8)}, "bias, but router_state has bais: pass router_state=init"),
        ({"bias": jnp.zeros(4)}, r"router_state\['bias'\] is float32\[4\]: .* shape \[8\]"),
        ({"bias": jnp.zeros((1, 8))}, r"of shape \[8\]"),
        ({"bias": jnp.zeros(8), "more": jnp.zeros(8)}, "has bias, more"),
    ],
)
def test_state_of_another_name_or_size_is_refused(state, sentence, x_BTD):
    moe = layer(router="sigmoid_bias")
    for given in ({"router_state": state}, {"context": context(router_state=state)}):
        with pytest.raises(UserError, match=sentence):
            moe(x_BTD, **given)


def test_explicit_meshes_are_refused_wherever_they_are(x_BTD):
    explicit = jax.make_mesh((8,), ("dp",), axis_types=(AxisType.Explicit,))
    hint = r"Explicit axes \(dp\): make it with axis_types=\(AxisType.Auto,\)\."
    with pytest.raises(UserError, match=f"x is on a mesh with {hint}"):
        layer()(jax.device_put(x_BTD, NamedSharding(explicit, P("dp"))))
    with jax.set_mesh(explicit), pytest.raises(UserError, match=f"mesh with {hint}"):
        layer()(x_BTD)
    ours = jax.make_mesh((8, 1, 1, 1), AXES, axis_types=(AxisType.Explicit,) * 4)
    for given in ({"mesh": ours}, {"context": context(mesh=ours)}):
        with pytest.raises(UserError, match=r"not Auto: .*\(AxisType.Auto,\) \* 4"):
            layer()(x_BTD, **given)


def model(**knobs):
    shape = moe_jax.ModelConfig(
        vocab_size=32,
        num_layers=2,
        width=WIDTH,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        ffn_width=16,
        moe=config(**{"num_experts": 4, **knobs}),
    )
    return moe_jax.Transformer(shape, rngs=nnx.Rngs(0))


ROW = np.zeros((1, 4), np.int32)


@pytest.mark.parametrize(
    ("tokens", "arguments", "sentence"),
    [
        (ROW[0], {}, r"Transformer got tokens int32\[4\]: .*\[rows, tokens\]"),
        (ROW * 1.0, {}, "pass integers of shape"),
        (ROW[:0], {}, "pass at least one row of one token"),
        (ROW, {"segments_BT": ROW[0]}, r"segments_BT is int32\[4\]"),
        (ROW, {"router_state": {"bias": ROW + 0.5}}, r"\[1, 4\]: pass floats of shape \[2, 4\]"),
        (ROW, {}, r"pass router_state=init_router_state\(config.moe, 2\)"),
        (ROW, {"positions_BT": ROW[:, 1:]}, r"positions_BT is int32\[1, 3\]"),
    ],
)
def test_a_model_refuses_what_does_not_fit(tokens, arguments, sentence):
    """Both parts of a call refuse: `make_context` its arguments, `apply` what comes with them."""
    whole = model(router="sigmoid_bias")  # in two layers
    tokens, arguments = jax.tree.map(jnp.asarray, (tokens, arguments))
    with pytest.raises(UserError, match=sentence):
        own = {k: v for k, v in arguments.items() if k != "positions_BT"}
        if "positions_BT" in arguments:
            own["router_state"] = {"bias": jnp.zeros((2, 4))}
        made = unchecked(moe_jax.Transformer.make_context)(whole, tokens, **own)
        arguments.pop("router_state", None)
        unchecked(moe_jax.Transformer.apply)(whole, tokens, made, **arguments)


@pytest.mark.lifecycle
def test_the_modes_of_a_model_are_those_of_its_layers():
    """Calls are evaluations until train(); train() and eval() are like passing `deterministic`."""
    whole, tokens_BT, key = model(expert_dropout=0.5), jnp.zeros((2, 4), int), jax.random.key(0)
    evaluated = whole(tokens_BT, deterministic=True)
    trained = whole(tokens_BT, key=key, deterministic=False)
    assert (np.asarray(evaluated) != np.asarray(trained)).any()
    np.testing.assert_array_equal(whole(tokens_BT), evaluated)
    whole.train()
    np.testing.assert_array_equal(whole(tokens_BT, key=key), trained)
    with pytest.raises(UserError, match="expert_dropout samples in training"):
        whole(tokens_BT)
    whole.eval()
    np.testing.assert_array_equal(whole(tokens_BT), evaluated)


def test_a_sentence_names_the_object_that_took_a_names_place():
    with pytest.raises(UserError, match="dispatch Mine does not sort"):
        moe_jax.MoE(config(matmul="float8"), WIDTH, dispatch=Mine(), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="dispatch dense does not sort"):
        moe_jax.MoE(config(matmul="float8", dispatch="dense"), WIDTH, rngs=nnx.Rngs(0))
    parts = Components(ExpertChoiceRouter(), Mine())
    shape = moe_jax.ModelConfig(vocab_size=8, num_layers=1, width=WIDTH, moe=config())
    with pytest.raises(UserError, match="ExpertChoiceRouter: later tokens affect"):
        moe_jax.Transformer(shape, parts, rngs=nnx.Rngs(0))
    parts = Components(TopK(), Capacity(priority="batch"))
    with pytest.raises(UserError, match="priority is batch"):
        moe_jax.Transformer(shape, parts, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="Router SigmoidBias keeps state"):
        moe_jax.MoE(config(), WIDTH, router=SigmoidBias(), rngs=nnx.Rngs(0))(jnp.ones((1, 4, 16)))


class Mine(Dense):
    """A dispatch path that is in no table."""


@pytest.mark.parametrize("router", sorted(moe_jax.ROUTERS))
def test_a_study_has_the_experts_of_the_routers_config(router, x_BTD):
    made = moe_jax.make_router(config(num_experts=16, router=router))
    assert moe_jax.study_router(made, x_BTD).load_E.shape == (16,)


def test_a_study_takes_no_number_of_experts_for_granted(x_BTD):
    study = moe_jax.study_router
    with pytest.raises(UserError, match="how many experts TopK chooses from: pass num_experts="):
        study(TopK(), x_BTD)
    assert study(TopK(), x_BTD, num_experts=4).load_E.shape == (4,)
    params = {"kernel": jnp.ones((WIDTH, 5))}
    assert study(TopK(), x_BTD, params=params).load_E.shape == (5,)
    with pytest.raises(UserError, match=r"\(4 from num_experts and 5 from params\['kernel'\]\)"):
        study(TopK(), x_BTD, params=params, num_experts=4)
    with pytest.raises(UserError, match=r"\(4 from num_experts and 8 from the router\)"):
        study(SigmoidBias(), x_BTD, num_experts=4)
    with pytest.raises(UserError, match=r"got params \['kern'\]: pass kernel"):
        study(TopK(), x_BTD, params={"kern": jnp.ones(5)}, num_experts=5)
    with pytest.raises(UserError, match=r"state\['bias'\] is float32\[4\]"):
        study(SigmoidBias(), x_BTD, state={"bias": jnp.ones(4)})
    with pytest.raises(UserError, match="study_router got x"):
        unchecked(study)(TopK(), x_BTD[0], num_experts=4)


def test_padding_gets_zero_and_no_slot(x_BTD):
    mask_BT = jnp.arange(12) < 5
    mask_BT = jnp.broadcast_to(mask_BT, (8, 12))
    y_BTD, aux = layer(group_rows=1)(x_BTD, mask_BT=mask_BT)
    assert not np.asarray(y_BTD)[:, 5:].any()
    assert int(aux.load_E.sum()) == 8 * 5 * 2
