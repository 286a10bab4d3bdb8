"""Optimizer state is sharded like its parameters, saved, and restored unchanged."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from small_run import ONE_LAYER, small_config, write_corpus

from moe_jax.config import to_json
from moe_jax.data.feed import DeviceFeed
from moe_jax.errors import UserError
from moe_jax.record.provenance import write_run_record
from moe_jax.run.context import Run
from moe_jax.run.evaluate import batch_shardings
from moe_jax.run.loop import compile_step, save
from moe_jax.run.restore import restore_or_init_state
from moe_jax.run.setup import prepare
from moe_jax.train import optim
from moe_jax.train.state import TrainState

OVERRIDES = {**ONE_LAYER, "model.moe.router": "sigmoid_bias", "eval.samples": 0}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def restored(run: Run) -> TrainState:
    return restore_or_init_state(run, "", lambda line: None)


def steps(run: Run, step_fn: jax.stages.Compiled, state: TrainState, last: int) -> TrainState:
    """Train from `state` up to step `last`; returns the new state."""
    first = int(state.step)
    with DeviceFeed(
        run.batches.rows, run.microbatch, batch_shardings(run.mesh), first, last
    ) as feed:
        for _, batch in feed:
            state, _ = step_fn(state, batch)
    return state


@pytest.mark.lifecycle
@pytest.mark.parametrize(
    ("name", "options"), [("optax.scale_by_lion", {"b1": 0.8, "b2": 0.9}), ("muon", {})]
)
def test_an_optimizer_resumes_bitwise(tmp_path, corpus, name, options):
    """Two steps, a checkpoint and two more are four steps, on scanned layers and 4 devices."""

    def start(folder: str) -> Run:
        overrides = {"model.moe.every": 1, "model.scan_layers": True, "mesh.expert": 4}
        config = small_config(corpus, **OVERRIDES | overrides | {"optimizer.warmup_steps": 0})
        optimizer = dataclasses.replace(config.optimizer, name=name, options=options)
        config = dataclasses.replace(config, optimizer=optimizer)
        return prepare(config, tmp_path / folder, lambda line: None, jax.devices()[:4])

    whole = start("straight")
    step_fn = compile_step(whole)
    straight = steps(whole, step_fn, restored(whole), 4)
    first = start("halves")
    save(first, steps(first, step_fn, restored(first), 2), 2)
    first.checkpoints.close()
    write_run_record(str(first.workdir), to_json(first.config), {}, first.store.fingerprint)
    second = start("halves")
    back = restored(second)
    assert int(back.step) == 2
    moments = [leaf for leaf in jax.tree.leaves(back.optimizer) if leaf.ndim > 1]
    assert moments and all(np.any(leaf) for leaf in moments)
    jax.tree.map(np.testing.assert_array_equal, steps(second, step_fn, back, 4), straight)


def adafactor_run(corpus, folder: Path) -> Run:
    """Two scanned layers on 4 devices, two experts each."""
    sizes = {"model.num_layers": 2, "model.scan_layers": True, "mesh.expert": 4}
    config = small_config(corpus, **OVERRIDES | sizes | {"optimizer.name": "adafactor"})
    return prepare(config, folder, lambda line: None, jax.devices()[:4])


def saved(run: Run) -> TrainState:
    """Save a state whose moments all differ from zero as the checkpoint of step 0."""
    state = restored(run)
    moments = jax.tree.map(lambda leaf: leaf + 1, state.optimizer)
    state = dataclasses.replace(state, optimizer=moments)
    save(run, state, 0)
    run.checkpoints.close()
    write_run_record(str(run.workdir), to_json(run.config), {}, run.store.fingerprint)
    return state


def test_adafactor_s_state_is_restored_as_it_was(tmp_path, corpus):
    """State kept per expert is sharded over the experts."""
    state = saved(adafactor_run(corpus, tmp_path / "run"))
    back = restored(adafactor_run(corpus, tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, back.optimizer, state.optimizer)
    split = 0
    for before, after in zip(
        jax.tree.leaves(state.optimizer), jax.tree.leaves(back.optimizer), strict=True
    ):
        assert after.sharding.is_equivalent_to(before.sharding, after.ndim)
        split += after.ndim > 1 and not after.sharding.is_fully_replicated
    assert split >= 6  # w_in and w_out: rows, columns and what is not factored


def test_adafactor_s_state_of_an_earlier_version_is_refused(tmp_path, corpus, monkeypatch):
    """That version had one row and one column of factors for all experts together."""
    monkeypatch.setattr(optim, "ELEMENTWISE", ("adamw", "adafactor"))
    saved(adafactor_run(corpus, tmp_path / "run"))
    monkeypatch.undo()
    sentence = r"state in another layout: .*v_col is float32\[1\] in the checkpoint"
    with pytest.raises(UserError, match=sentence + r".*\(with --init_from to keep the weights"):
        restored(adafactor_run(corpus, tmp_path / "run"))
