"""The held-out loss depends on weights and held-out rows, not on how it is computed."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from small_run import ONE_LAYER, small_config, write_corpus

from moe_jax.data.pipeline import HeldOut
from moe_jax.run.evaluate import Evaluator
from moe_jax.run.restore import restore_or_init_state
from moe_jax.run.setup import prepare

# A third of the assignments is dropped in groups of two rows, so the loss depends on which rows
# share a group.  The last row of the sample is alone in its group.
DROPPING = ONE_LAYER | {
    "model.moe.group_rows": 2,
    "model.moe.capacity_factor": 0.7,
    "model.moe.eval_capacity_factor": 0.7,
    "eval.rows": 21,
    "mesh.data": 1,
}
# (rows per step, microbatches, mesh): an evaluation computes 2, 4, 8, 16 and 32 rows at once.
CELLS = [
    (2, 1, {}),
    pytest.param(32, 8, {}, marks=pytest.mark.lifecycle),
    pytest.param(16, 2, {"data": 4}, marks=pytest.mark.lifecycle),
    pytest.param(16, 1, {"expert": 8}, marks=pytest.mark.full),
    (32, 1, {"data": 2, "expert": 2}),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("heldout") / "text")


def evaluate(folder, corpus, **overrides):
    """(run, metrics row of the held-out evaluation of the initial weights)."""
    config = small_config(corpus, **DROPPING | overrides)
    devices = jax.devices()[: math.prod(dataclasses.asdict(config.mesh).values())]
    run = prepare(config, folder, lambda line: None, devices)
    return run, Evaluator(run)(restore_or_init_state(run, "", lambda line: None))


@pytest.fixture(scope="module")
def whole_sample(tmp_path_factory, corpus):
    """The sample in one batch, its last group filled with padding."""
    overrides = {"train.batch_size": 22}
    return evaluate(tmp_path_factory.mktemp("heldout") / "run", corpus, **overrides)[1]


@pytest.mark.parametrize(("rows", "accumulation", "mesh"), CELLS)
def test_batch_mesh_and_accumulation_change_rounding_alone(
    tmp_path, corpus, whole_sample, rows, accumulation, mesh
):
    overrides = {f"mesh.{axis}": size for axis, size in mesh.items()}
    overrides |= {"train.batch_size": rows, "train.accumulation": accumulation}
    _, row = evaluate(tmp_path, corpus, **overrides)
    exact = ("eval_rows", "eval_tokens", "eval_drop_fraction")
    assert [row[name] for name in exact] == [whole_sample[name] for name in exact]
    assert row["eval_rows"] == 21 and row["eval_drop_fraction"] > 0.2
    for name in ("eval_loss", "eval_loss_nodrop", "eval_bits_per_byte"):
        assert row[name] == pytest.approx(whole_sample[name], rel=2e-6), name


def test_groups_of_other_sizes_change_the_loss_with_drops_alone(tmp_path, corpus, whole_sample):
    overrides = {"train.batch_size": 8, "model.moe.group_rows": 8}
    _, row = evaluate(tmp_path, corpus, **overrides)
    assert row["eval_loss"] != pytest.approx(whole_sample["eval_loss"], rel=1e-5)
    assert row["eval_loss_nodrop"] == pytest.approx(whole_sample["eval_loss_nodrop"], rel=2e-6)


@pytest.mark.parametrize("rows", [1, 21, 10**9, 0])
def test_a_sample_is_the_first_rows_of_one_order(tmp_path, corpus, rows):
    run = prepare(
        small_config(corpus, **DROPPING | {"train.batch_size": 8, "eval.rows": rows}),
        tmp_path,
        lambda line: None,
        jax.devices()[:1],
    )
    whole = HeldOut(run.store, 1, 32)
    expected = min(rows or len(whole), len(whole))
    assert run.heldout.num_rows == expected < 10**9
    tokens = [run.heldout.rows(i, np.arange(8)) for i in range(len(run.heldout))]
    together = np.concatenate([batch.tokens_BT for batch in tokens])
    numbers = np.concatenate([batch.row_B for batch in tokens])
    for place in range(expected):
        np.testing.assert_array_equal(together[place], whole.rows(place, np.arange(1)).tokens_BT[0])
    assert numbers.tolist() == list(range(len(together)))
    assert not np.concatenate([batch.segments_BT for batch in tokens])[expected:].any()
