"""Compute-dtype copies of the weights: which weights have one, and that they stay equal to them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import Config, DataConfig
from moe_jax.data.batch import Batch, make_batch
from moe_jax.model.config import ModelConfig
from moe_jax.model.define import define
from moe_jax.moe.config import MoEConfig
from moe_jax.parallel.mesh import MeshConfig, make_mesh
from moe_jax.run.context import make_optimizer, make_step_options
from moe_jax.sections import TrainConfig
from moe_jax.train.copies import make_copies, with_copies
from moe_jax.train.optim import OptimizerConfig
from moe_jax.train.state import init_train_state
from moe_jax.train.step import jit_train_step, make_gradients

B, T, V = 4, 8, 50


def make(accumulation: int, scan: bool, dtype=jnp.bfloat16):
    """(model, options, mesh, state, step, batch): a dense block, then sparse ones."""
    moe = MoEConfig(num_experts=4, expert_width=16, first_dense=1, shared_experts=1, group_rows=1)
    model_config = ModelConfig(
        vocab_size=V,
        num_layers=3,
        width=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        ffn_width=32,
        qk_norm="head",
        scan_layers=scan,
        moe=moe,
    )
    config = Config(
        model=model_config,
        data=DataConfig(sequence_length=T),
        train=TrainConfig(batch_size=B, accumulation=accumulation),
        optimizer=OptimizerConfig(warmup_steps=0),
    )
    model = define(config.model, dtype)
    optimizer = make_optimizer(config, model)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    options = make_step_options(config)
    state = init_train_state(model, optimizer, mesh, jax.random.key(0))
    step = jit_train_step(model, optimizer, options, mesh)
    return model, options, mesh, state, step, batch(accumulation)


def batch(accumulation: int) -> Batch:
    shape = (accumulation, B // accumulation, T)
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, V, (2, *shape), np.int32)
    return make_batch(tokens, targets)


def assert_true(model, state) -> None:
    fresh = make_copies(model, state.params)
    assert fresh.keys() == state.copies.keys()
    for name, copy in state.copies.items():
        assert copy.dtype == jnp.bfloat16
        np.testing.assert_array_equal(copy, fresh[name], err_msg=name)


@pytest.mark.lifecycle
def test_a_step_reads_copies_as_it_would_read_the_weights():
    """The results have the same bits: a weight that some layer reads in float32 has no copy."""
    model, options, mesh, state, step, given = make(accumulation=2, scan=True)
    # Otherwise XLA keeps some gradients in more than bfloat16, different ones in the two programs.
    exact = {"xla_allow_excess_precision": False}
    gradients = jax.jit(make_gradients(model, options, mesh), compiler_options=exact)
    used = with_copies(state.params, state.copies)
    names = {name.rsplit("/", 1)[1] for name in state.copies}
    experts, attention = {"w_in_EDUF", "w_out_EFD"}, {"q_DHA", "k_DJA", "v_DJA", "o_HAD"}
    assert names == experts | attention | {"w_in_DF", "w_gate_DF", "w_out_FD"}

    want = gradients(state.params, state.router, given, state.step)
    got = gradients(used, state.router, given, state.step)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert {leaf.dtype for leaf in jax.tree.leaves(got[0])} == {jnp.dtype("float32")}

    # ---- the step reads the copies, not the weights
    other = jax.tree.map(jnp.copy, state)
    other = dataclasses.replace(other, copies=jax.tree.map(jnp.zeros_like, other.copies))
    plain = step(jax.tree.map(jnp.copy, state), given)[1]
    assert step(other, given)[1].loss.lm != plain.loss.lm

    # ---- copies are written with the weights, and unchanged if the weights are
    before = jax.device_get(state.params)
    state, _ = step(state, given)
    assert_true(model, state)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, jax.device_get(state.params))
    assert all(jax.tree.leaves(moved))
    bad = {**state.params, "norm": {"weight": state.params["norm"]["weight"] * jnp.nan}}
    kept = jax.device_get(state.copies)
    state, metrics = step(dataclasses.replace(state, params=bad), given)
    assert metrics.skipped
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.copies), kept)


def test_weights_in_the_computations_dtype_need_none():
    model, *_, state, _, _ = make(accumulation=1, scan=False, dtype=jnp.float32)
    assert state.copies == {} and make_copies(model, state.params) == {}
