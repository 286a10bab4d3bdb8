"""Router state depends on the load of the global batch and on nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checkpoint import Checkpoints
from moe_jax.config import Config
from moe_jax.data.batch import Batch, make_batch
from moe_jax.data.feed import put_batch
from moe_jax.model.config import ModelConfig
from moe_jax.model.define import define
from moe_jax.moe import layer
from moe_jax.moe.config import MoEConfig
from moe_jax.parallel.mesh import MeshConfig, make_mesh
from moe_jax.run.context import make_optimizer, make_step_options
from moe_jax.sections import TrainConfig
from moe_jax.train.optim import OptimizerConfig
from moe_jax.train.state import TrainState, from_disk, init_train_state, to_disk
from moe_jax.train.step import jit_train_step

B, T, E, V, LAYERS = 16, 8, 4, 50, 2
RATE = 0.01


def config(accumulation=1, scan=False, **moe) -> Config:
    options = {"sigmoid_bias": {"update_rate": RATE}}
    moe = MoEConfig(
        num_experts=E,
        expert_width=16,
        router="sigmoid_bias",
        group_rows=1,
        options=options,
        **moe,
    )
    model = ModelConfig(
        vocab_size=V,
        num_layers=LAYERS,
        width=16,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        ffn_width=16,
        scan_layers=scan,
        moe=moe,
    )
    train = TrainConfig(batch_size=B, accumulation=accumulation, debug=True)
    return Config(model=model, train=train, optimizer=OptimizerConfig(warmup_steps=0))


def batch(accumulation: int, mesh) -> Batch:
    """Random tokens; the second half of the last row is padding."""
    rng = np.random.default_rng(0)
    segments = np.ones((B, T), np.int32)
    segments[-1, T // 2 :] = 0
    tokens, targets = (rng.integers(0, V, (B, T), np.int32) for _ in range(2))
    return put_batch(make_batch(tokens, targets, segments), mesh, accumulation)


def make(config: Config, **axes):
    """(state, step function, batch) on a mesh of the first devices."""
    sizes = MeshConfig(**{"data": 1, **axes})
    mesh = make_mesh(sizes, jax.devices()[: sizes.batch_shards * sizes.tensor])
    model = define(config.model, jnp.float32)
    optimizer = make_optimizer(config, model)
    step = jit_train_step(model, optimizer, make_step_options(config), mesh)
    return (
        init_train_state(model, optimizer, mesh, jax.random.key(0)),
        step,
        batch(config.train.accumulation, mesh),
    )


def host(tree):
    """Copy the state, because the step donates its input."""
    return jax.tree.map(lambda leaf: np.array(leaf), tree)


@pytest.fixture(scope="module")
def compiled():
    """(state, step function, batch) on one device; a test copies the state, the step donates it."""
    return make(config())


def copy(state):
    return jax.tree.map(jnp.copy, state)


@pytest.fixture(scope="module")
def one_device(compiled):
    """Bias and metrics of two steps."""
    state, step, given = copy(compiled[0]), *compiled[1:]
    assert not np.any(state.router["bias"])
    found = []
    for _ in range(2):
        state, metrics = step(state, given)
        found.append((host(state.router["bias"]), host(metrics)))
    return found


def test_the_bias_moves_towards_an_even_load(one_device):
    expected = np.zeros((LAYERS, E), np.float32)
    for bias_LE, metrics in one_device:
        load_LE = metrics.moe.load_E
        assert load_LE.sum() == LAYERS * 2 * (B * T - T // 2)  # padding has no load
        assert len(set(load_LE[0])) > 1
        expected += np.float32(RATE) * np.sign(load_LE.mean(1, keepdims=True) - load_LE)
        np.testing.assert_allclose(bias_LE, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("accumulation", "scan", "axes"),
    [
        (2, False, {"data": 2, "expert": 4}),
        pytest.param(4, True, {"data": 2, "tensor": 2}, marks=pytest.mark.lifecycle),
    ],
)
def test_it_counts_all_microbatches_and_devices(one_device, accumulation, scan, axes):
    state, step, given = make(config(accumulation, scan), **axes)
    for bias_LE, metrics in one_device:
        state, found = step(state, given)
        np.testing.assert_array_equal(found.moe.load_E, metrics.moe.load_E)
        np.testing.assert_array_equal(state.router["bias"], bias_LE)


def test_balance_is_taken_in_each_layer(compiled):
    """Layer 0 uses half of the experts and layer 1 the other half: 2 each, and 1 if pooled.

    All embeddings are ones, and the blocks add zero to them.
    """
    state, step, given = copy(compiled[0]), *compiled[1:]
    params = jax.tree.map(jnp.zeros_like, state.params)
    params["embed_VD"] += 1
    for name, experts in (("0", slice(0, E // 2)), ("1", slice(E // 2, E))):
        block = params["blocks"][name] = dict(state.params["blocks"][name])
        block["attention"] = jax.tree.map(jnp.zeros_like, block["attention"])
        block["ffn"] = jax.tree.map(jnp.zeros_like, block["ffn"])
        kernel_DE = jnp.full_like(block["ffn"]["router_kernel"], -1.0)
        block["ffn"]["router_kernel"] = kernel_DE.at[:, experts].set(1.0)
    _, metrics = step(dataclasses.replace(state, params=params), given)
    per_layer = metrics.moe.router.balance
    np.testing.assert_allclose(per_layer.value(), 2, rtol=1e-4)
    load_LE = np.asarray(metrics.moe.load_E)
    assert len(set(load_LE.sum(0))) == 1 and (load_LE == 0).sum() == LAYERS * E // 2
    np.testing.assert_allclose(metrics.loss.balance, 2, rtol=1e-4)


def test_a_step_that_is_not_finite_changes_nothing_but_the_counter(compiled):
    state, step, given = copy(compiled[0]), *compiled[1:]
    state, metrics = step(state, given)
    assert not metrics.skipped
    head_DV = jnp.full_like(state.params["head_DV"], 1e38)
    state = dataclasses.replace(state, params={**state.params, "head_DV": head_DV})
    before = host(state)
    state, metrics = step(state, given)
    assert metrics.skipped and not np.isfinite(metrics.loss.total)
    assert (
        len(set(np.asarray(metrics.moe.load_E)[0])) > 1
    )  # the load differs, so the bias has to change
    after = host(state)
    counted = {**before.guard, "not_finite": before.guard["not_finite"] + 1}
    jax.tree.map(
        np.testing.assert_array_equal,
        after,
        dataclasses.replace(before, step=before.step + 1, guard=counted),
    )
    assert counted["not_finite"] == 1 == before.guard["changed"] == before.guard["accepted"]


def test_it_is_saved_and_restored(tmp_path, one_device):
    state, _, _ = make(config())
    model = define(config().model, jnp.float32)
    bias = jnp.asarray(one_device[0][0])
    state = dataclasses.replace(state, router={"bias": bias})
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, to_disk(state, model.layout))
    checkpoints.wait()
    target = jax.eval_shape(lambda: to_disk(state, model.layout))
    back: TrainState = from_disk(checkpoints.restore(2, target), model, state.fall)
    checkpoints.close()
    np.testing.assert_array_equal(back.router["bias"], bias)
    assert np.any(back.router["bias"])


def test_a_frozen_router_stays_as_it_is():
    state, step, given = make(config(freeze_router=True))
    before = host(state)
    state, metrics = step(state, given)
    after = host(state)
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), after.params, before.params)
    for path, moved in jax.tree.leaves_with_path(changed):
        assert moved == (path[-1].key != "router_kernel"), path
    assert not np.any(after.router["bias"])
    assert metrics.moe.router.balance.count.sum() > 0


def test_a_lost_assignment_ends_the_step_in_debug_mode(monkeypatch):
    def loses_one(*arguments):
        stats, ledger = account(*arguments)
        kept = ledger.position.kept.at[0].add(-1)
        return stats, ledger._replace(position=ledger.position._replace(kept=kept))

    account = layer.count_outcomes
    monkeypatch.setattr(layer, "count_outcomes", loses_one)
    state, step, given = make(config())
    with pytest.raises(Exception, match="assignments by position are not conserved"):
        jax.block_until_ready(step(state, given))
        jax.effects_barrier()
