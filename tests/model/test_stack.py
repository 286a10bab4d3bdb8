"""The model as pure functions: layouts, remat, causality, sharding."""

import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.errors import UserError
from moe_jax.model.config import ModelConfig
from moe_jax.model.define import define, is_axes
from moe_jax.model.forward import forward, head_weight
from moe_jax.model.initialize import init, init_on
from moe_jax.model.layout import LayerLayout, make_layout, to_layers, to_stacked
from moe_jax.moe.config import MoEConfig
from moe_jax.moe.types import MoEContext
from moe_jax.nn.remat import REMAT
from moe_jax.ops.cross_entropy import cross_entropy
from moe_jax.parallel.mesh import MeshConfig, make_mesh
from moe_jax.parallel.rules import sharding, spec

B, T = 4, 16
DENSE = ModelConfig(
    vocab_size=40,
    num_layers=3,
    width=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    ffn_width=32,
    dense=True,
)
# Dense, then (MoE, dense) twice, then MoE: a prefix, two repeats of a period of two, a remainder.
SPARSE = dataclasses.replace(
    DENSE,
    dense=False,
    num_layers=6,
    qk_norm="full",
    moe=MoEConfig(
        dispatch="dense",
        num_experts=4,
        expert_width=8,
        every=2,
        first_dense=1,
        options={"top_k": {"jitter": 0.3}},
    ),
)


def batch(seed=1):
    tokens = jax.random.randint(jax.random.key(seed), (B, T), 0, 40)
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    segments = jnp.where(positions < 6, 1, 2).at[-1, -3:].set(0)
    return tokens, positions, segments


def run(model, params, tokens, positions, segments, mesh, train=True):
    keys = jax.random.split(jax.random.key(3), B)
    context = MoEContext(tokens, segments > 0, keys, mesh, group_rows=2, train=train)
    return forward(model, params, tokens, positions, segments, context)


def step(config, mesh, dtype=jnp.float64):
    """Initial parameters, (loss, activations, aux) and gradients of one batch."""
    model = define(config, dtype)

    def loss(params, tokens, positions, segments):
        x, aux = run(model, params, tokens, positions, segments, mesh)
        head, real = head_weight(model, params), segments > 0
        out = cross_entropy(x, head, tokens, real, z_weight=0.0, chunk=50, mesh=mesh)
        return out.loss_sum / out.count, (x, aux)

    params = jax.jit(lambda key: init(model, key))(jax.random.key(0))
    (value, rest), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, *batch())
    return model, params, (value, *rest), grads


def assert_close(a, b, atol=1e-13):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-12), a, b)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_layouts():
    scanned = dataclasses.replace(SPARSE, scan_layers=True)
    assert make_layout(SPARSE) == LayerLayout(6)
    assert make_layout(scanned) == LayerLayout(6, prefix=1, period=2, repeats=2)
    assert make_layout(scanned).unrolled() == [0, 5]
    assert make_layout(dataclasses.replace(scanned, num_layers=4)).repeats == 0  # nothing repeats
    assert make_layout(dataclasses.replace(DENSE, scan_layers=True)) == LayerLayout(3, 0, 1, 3)


@pytest.fixture(scope="module")
def scanned():
    """`scanned(config)`: `step` with scanned layers on one device, computed once per config."""
    found = {}

    def once(config):
        name = str(config)
        if name not in found:
            mesh = make_mesh(MeshConfig(), jax.devices()[:1])
            found[name] = step(dataclasses.replace(config, scan_layers=True), mesh)
        return found[name]

    return once


# The sparse model has dense layers too and runs in the lifecycle stage, because it takes long to
# compile.  A model with only dense layers runs with --full.
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(DENSE, marks=pytest.mark.full),
        pytest.param(SPARSE, marks=pytest.mark.lifecycle),
    ],
    ids=["dense", "sparse"],
)
def test_scanned_equals_unrolled(x64, mesh_of, scanned, config):
    """Values, statistics per layer, router noise and gradients agree; initial values are equal."""
    _, params, out, grads = step(config, mesh_of())
    model, stacked, scanned_out, scanned_grads = scanned(config)
    assert model.layout.repeats >= 2
    assert_equal(to_layers(stacked, model.layout), params)
    assert_equal(to_stacked(params, model.layout), stacked)
    assert_close(scanned_out, out)
    assert_close(to_layers(scanned_grads, model.layout), grads)


@pytest.mark.lifecycle
def test_the_router_is_noisy_in_training_only(mesh_of):
    """A control of the comparison above, which without noise would hold for any keys."""
    model = define(dataclasses.replace(SPARSE, num_layers=2), jnp.float32)
    params = jax.jit(lambda key: init(model, key))(jax.random.key(0))

    def compute(train):
        return jax.jit(lambda p: run(model, p, *batch(), mesh_of(), train)[0])(params)

    assert np.abs(compute(True) - compute(False)).max() > 1e-4


class Pair(NamedTuple):
    """Two unrolled MoE layers without remat, and one step of them."""

    config: ModelConfig
    out: Any
    grads: Any


@pytest.fixture(scope="module")
def unscanned_pair():
    """`Pair` on one device, in float64."""
    moe = dataclasses.replace(SPARSE.moe, dispatch="capacity", every=1, first_dense=0)
    config = dataclasses.replace(SPARSE, num_layers=2, moe=moe)
    with jax.enable_x64(True):
        _, _, out, grads = step(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    return Pair(config, out, grads)


# The default stage tests the policy that repeats no collective, the lifecycle stage the one that
# recomputes most; both with scanned layers.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("full", marks=pytest.mark.lifecycle),
        "save_dispatch",
        *(
            pytest.param(name, marks=pytest.mark.full)
            for name in sorted(REMAT.keys() - {"none", "full", "save_dispatch"})
        ),
    ],
)
def test_remat_changes_no_value(x64, mesh_of, unscanned_pair, name):
    scan = name in ("full", "save_dispatch")
    again = dataclasses.replace(unscanned_pair.config, remat=name, scan_layers=scan)
    model, _, remat_out, remat_grads = step(again, mesh_of())
    assert_close(remat_out, unscanned_pair.out)
    assert_close(to_layers(remat_grads, model.layout), unscanned_pair.grads)


def test_remat_recomputes(mesh_of):
    """A policy that saves less has more matmuls, so the tags are where the policies expect them.

    "dots" recomputes only the batched matmuls of attention, "save_hidden" also the projections.
    """

    def dots(name):
        model = define(dataclasses.replace(DENSE, remat=name), jnp.float32)
        params = model.abstract

        def loss(params):
            return run(model, params, *batch(), mesh_of())[0].sum()

        return jax.jit(jax.grad(loss)).lower(params).as_text().count("dot_general")

    assert dots("none") < dots("dots") < dots("save_hidden") < dots("full")


@pytest.mark.parametrize("policy", sorted(REMAT.keys() - {"none"}))
def test_no_policy_computes_what_experts_made_again(mesh_of, policy):
    """There are two matmuls with results of model width in expert slots.

    One makes the expert outputs and one the gradient of the expert inputs.
    """
    moe = dataclasses.replace(SPARSE.moe, dispatch="capacity", every=1, first_dense=0)
    moe = dataclasses.replace(moe, expert_width=12)
    config = dataclasses.replace(SPARSE, num_layers=1, moe=moe, remat=policy)
    model = define(config, jnp.float32)

    def loss(params):
        return run(model, params, *batch(), mesh_of())[0].sum()

    text = jax.jit(jax.grad(loss)).lower(model.abstract).as_text()
    made = re.findall(r"dot_general.*-> tensor<(\d+x\d+x\d+)xf32>", text)
    slots = B * T * moe.top_k * 5 // 4 // moe.num_experts
    assert made.count(f"4x{slots}x{config.width}") == 2
    kept = policy == "save_hidden"  # what the first matmul made
    assert made.count(f"4x{slots}x{2 * moe.expert_width}") == (1 if kept else 2)


@pytest.mark.parametrize(("policy", "times"), [("none", 6), ("save_dispatch", 6), ("full", 8)])
@pytest.mark.parametrize(
    "dispatch", ["capacity", pytest.param("dropless", marks=pytest.mark.lifecycle)]
)
def test_save_dispatch_sends_nothing_again(mesh_of, policy, times, dispatch):
    """All-to-alls: tokens, their outputs and combine weights (3), and gradients of each (3)."""
    moe = dataclasses.replace(SPARSE.moe, dispatch=dispatch, every=1, first_dense=0)
    moe = dataclasses.replace(moe, options={"dropless": {"recv_factor": 2.0}})
    model = define(dataclasses.replace(SPARSE, num_layers=1, moe=moe, remat=policy), jnp.float32)

    def loss(params):
        return run(model, params, *batch(), mesh_of(expert=2))[0].sum()

    text = jax.jit(jax.grad(loss)).lower(model.abstract).as_text()
    sent = re.findall(r"all_to_all.*-> tensor<\S*xf32>", text)
    assert len(sent) == times


def test_an_unknown_policy_is_refused():
    with pytest.raises(UserError, match=r"model.remat 'ful' is unknown .did you mean 'full'"):
        dataclasses.replace(DENSE, remat="ful")


def test_dense_model_is_causal_to_the_bit(mesh_of):
    model = define(DENSE, jnp.float32)
    params = jax.jit(lambda key: init(model, key))(jax.random.key(0))
    tokens, positions, segments = batch()
    compute = jax.jit(lambda tokens: run(model, params, tokens, positions, segments, mesh_of())[0])
    plain, changed = compute(tokens), compute(tokens.at[:, 9:].set(5))
    np.testing.assert_array_equal(plain[:, :9], changed[:, :9])
    assert (np.asarray(plain[:, 9:]) != np.asarray(changed[:, 9:])).any()


@pytest.mark.lifecycle
def test_confined_attention_stops_at_documents(mesh_of):
    tokens, positions, segments = batch()

    def second_document(config, tokens):
        model = define(config, jnp.float32)
        params = jax.jit(lambda key: init(model, key))(jax.random.key(0))
        compute = jax.jit(lambda t: run(model, params, t, positions, segments, mesh_of())[0])
        return np.asarray(compute(tokens))[:, 6:]

    other = tokens.at[:, :6].set(7)
    confined = dataclasses.replace(DENSE, confine_attention=True)
    np.testing.assert_array_equal(
        second_document(confined, tokens), second_document(confined, other)
    )
    assert (second_document(DENSE, tokens) != second_document(DENSE, other)).any()


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(("flags", "apart"), [("", False), ("--xla_gpu_deterministic_ops=1", True)])
def test_blocks_are_traced_once_unless_their_attention_has_to_differ(
    mesh_of, monkeypatch, flags, apart, scan
):
    """Equal backward passes of cuDNN's attention end a run whose kernels are deterministic."""
    scales = []

    def note(q, *operands, scale, **how):
        scales.append(scale)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", note)
    monkeypatch.setenv("XLA_FLAGS", flags)
    config = SPARSE if scan else DENSE
    model = define(dataclasses.replace(config, attention="cudnn", scan_layers=scan), jnp.bfloat16)
    jax.eval_shape(lambda params: run(model, params, *batch(), mesh_of())[0], model.abstract)
    # With scanned layers, the first and last layer are unrolled and two kinds of blocks scanned.
    assert len(set(scales)) == ((4 if scan else 3) if apart else 1)
    assert scan or len(scales) == len(set(scales))


@pytest.mark.lifecycle
@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.full), True])
def test_values_drawn_by_kind_of_block_are_those_drawn_at_once(mesh_of, scan):
    model = define(dataclasses.replace(SPARSE, scan_layers=scan), jnp.float32)
    where = jax.tree.map(lambda _: NamedSharding(mesh_of(), PartitionSpec()), model.abstract)
    at_once = jax.jit(lambda key: init(model, key))(jax.random.key(1))
    assert_equal(init_on(model, jax.random.key(1), where), at_once)


@pytest.mark.lifecycle
def test_same_on_a_mesh_and_every_parameter_is_placed(x64, mesh_of, scanned):
    model, params, out, grads = scanned(SPARSE)
    mesh = mesh_of(fsdp=2, tensor=2)
    places = jax.tree.map(lambda axes: sharding(mesh, axes), model.logical_axes, is_leaf=is_axes)
    placed = init_on(model, jax.random.key(0), places)
    assert_equal(placed, params)
    assert all(
        leaf.sharding.is_equivalent_to(place, leaf.ndim)
        for leaf, place in zip(jax.tree.leaves(placed), jax.tree.leaves(places), strict=True)
    )
    split = [leaf for leaf in jax.tree.leaves(placed) if not leaf.sharding.is_fully_replicated]
    assert sum(leaf.size for leaf in split) > 0.95 * sum(
        leaf.size for leaf in jax.tree.leaves(placed)
    )

    def loss(params):
        x, aux = run(model, params, *batch(), mesh)
        tokens, _, segments = batch()
        head = head_weight(model, params)
        sums = cross_entropy(x, head, tokens, segments > 0, z_weight=0.0, chunk=50, mesh=mesh)
        return sums.loss_sum / sums.count, (x, aux)

    (value, rest), mesh_grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(placed)
    assert_close((value, *rest), out, atol=1e-10)
    assert_close(mesh_grads, grads, atol=1e-10)


def test_logical_axes_match_shapes_and_are_known():
    for config in (DENSE, SPARSE, dataclasses.replace(SPARSE, scan_layers=True, tied_head=True)):
        model = define(config, jnp.float32)
        axes = jax.tree.leaves(model.logical_axes, is_leaf=is_axes)
        shapes = jax.tree.leaves(model.abstract)
        assert len(axes) == len(shapes)
        for names, leaf in zip(axes, shapes, strict=True):
            assert len(names) == len(leaf.shape)
            spec(names)  # raises for an unknown or colliding name


GROUP_OF = {
    "embed_VD": "embedding",
    "head_DV": "head",
    **dict.fromkeys(("q_DHA", "k_DJA", "v_DJA", "o_HAD"), "attention"),
    **dict.fromkeys(("w_in_DF", "w_gate_DF", "w_out_FD"), "ffn"),
    **dict.fromkeys(("w_in_EDUF", "w_out_EFD"), "experts"),
    **dict.fromkeys(("router_kernel", "router_noise_kernel"), "router"),
    "weight": "norm",
}


@pytest.mark.parametrize("scan", [False, True])
def test_the_optimizers_rule_of_every_parameter(scan):
    """Matrices are decayed and norms are not; only scanned parameters have an axis of layers."""
    moe = dataclasses.replace(SPARSE.moe, router="noisy_top_k", shared_experts=1, options={})
    config = dataclasses.replace(SPARSE, qk_norm="head", scan_layers=scan, moe=moe)
    model = define(config, jnp.float32)
    seen = set()
    for path, rule in jax.tree.leaves_with_path(model.rules):
        name = path[-1].key
        assert rule.group == GROUP_OF[name], path
        assert (rule.decay_group == "norm") == (name == "weight"), path
        assert rule.stacked == (path[0].key == "stack"), path
        seen.add(name)
    assert seen == set(GROUP_OF)
    assert jax.tree.structure(model.rules) == jax.tree.structure(model.abstract)


def test_abstract_parameters_are_those_of_init():
    model = define(dataclasses.replace(SPARSE, scan_layers=True), jnp.bfloat16)
    real = jax.eval_shape(lambda: init(model, jax.random.key(0)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), real) == jax.tree.map(
        lambda x: (x.shape, x.dtype), model.abstract
    )
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(real))


def test_a_tied_head_is_the_embedding(x64):
    model = define(dataclasses.replace(DENSE, tied_head=True), jnp.float64)
    params = jax.jit(lambda key: init(model, key))(jax.random.key(0))
    assert "head_DV" not in params
    np.testing.assert_array_equal(head_weight(model, params), params["embed_VD"].T)
