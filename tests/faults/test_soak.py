"""The soak: a run that is killed in every phase ends equal to one that is not."""

import json
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from small_run import small_config

from benchmarks.soak import pair
from benchmarks.soak.__main__ import plan, soak
from benchmarks.soak.compare import differences
from moe_jax.checkpoint import Checkpoints
from moe_jax.moe.components import make_components
from moe_jax.record.screen import eval_line, train_line
from moe_jax.run.resolve import describe


@pytest.mark.lifecycle
def test_three_kills(tmp_path, monkeypatch, cli_env):
    """One kill in the store build, one during training, one at the end.

    The default tests try each alone: test_store.py kills a build, test_resume.py a run and its end;
    test_tpu_vm.py stops two processes and restarts them.
    """
    for name, value in cli_env.items():
        monkeypatch.setenv(name, value)
    assert soak(tmp_path / "soak", kills=3, seed=5, megabytes=10.0) == []


def test_the_kills_of_a_seed():
    kills = plan(40, random.Random(0))
    assert plan(40, random.Random(0)) == kills != plan(40, random.Random(1))
    phases = [kill.phase for kill in kills]
    assert phases[:5] == [pair.STORE] * 5 and phases[-5:] == [pair.END] * 5
    assert all(phases.count(phase) == 5 for phase in pair.PHASES)
    assert {kill.targets for kill in kills} == {(0,), (1,), (0, 1)}
    assert {kill.signal for kill in kills} == {signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP}


def test_what_the_lead_says_tells_the_phase():
    """The soak recognises phases by lines of the trainer and its supervisor: they must match."""
    config = small_config("*.txt", eval__every=2)
    lines = {
        "2026-01-01T00:00:00+00:00 restart 1: killed by SIGKILL; reached step 4, resumes from 2, "
        "2 steps lost, waiting 5 s": pair.START,
        describe(config, make_components(config.model.moe))[1]: pair.RESTORE,
        "resuming from step 2": pair.RESTORE,
        "state ready in 0.5 s": pair.COMPILE,
        "compiled the train step in 1.2 s": pair.STEPS,
        train_line({"step": 3, "loss": 2.5}, 5): pair.STEPS,
        train_line({"step": 4, "loss": 2.5}, 5): pair.EVALUATION,
        eval_line({"step": 4, "eval_loss": 2.5}, 5): pair.STEPS,
        train_line({"step": 5, "loss": 2.5}, 5): pair.END,
    }
    phase, step = pair.STEPS, 0
    for line, expected in lines.items():
        phase, step = pair.after_line(line, phase, step, eval_every=2)
        assert phase == expected, line
    assert step == 5


def write_run(folder: Path) -> Path:
    """Write the smallest files that a run leaves behind; returns its workdir."""
    workdir = folder / "run"
    checkpoints = Checkpoints(workdir / "checkpoints")
    checkpoints.save(2, {"params": {"w": np.arange(4.0)}, "step": np.int64(2)})
    checkpoints.close()
    rows = [{"step": 1, "loss": 2.5, "step_seconds": 0.1}, {"step": 2, "loss": 2.25, "mfu": 0.1}]
    (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (workdir / "samples.txt").write_text("abc\n")
    (folder / "stores" / "0123").mkdir(parents=True)
    (folder / "stores" / "0123" / "manifest.json").write_text("{}")
    return workdir


def other_weights(workdir: Path) -> None:
    shutil.rmtree(workdir / "checkpoints")
    checkpoints = Checkpoints(workdir / "checkpoints")
    w = np.nextafter(np.arange(4.0), 9.0, where=np.arange(4) == 3, out=np.arange(4.0))
    checkpoints.save(2, {"params": {"w": w}, "step": np.int64(2)})
    checkpoints.close()


def other_row(workdir: Path) -> None:
    text = (workdir / "metrics.jsonl").read_text()
    (workdir / "metrics.jsonl").write_text(text.replace("2.25", "2.2500000000000004"))


def row_twice(workdir: Path) -> None:
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join([lines[0], *lines]))


def other_clocks(workdir: Path) -> None:
    text = (workdir / "metrics.jsonl").read_text()
    (workdir / "metrics.jsonl").write_text(text.replace("0.1", "0.7"))


def other_store(workdir: Path) -> None:
    (workdir.parent / "stores" / "0123" / "manifest.json").write_text("{ }")


def bad_step_aside(workdir: Path) -> None:
    (workdir / "checkpoints" / "quarantine" / "1").mkdir(parents=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_clocks, []),
        (other_weights, ["checkpoint 2: params/w differs in 1 of 4 values"]),
        (other_row, ["metrics.jsonl:2: loss is 2.2500000000000004, should be 2.25"]),
        (row_twice, ["metrics.jsonl:2: loss is 2.5, should be 2.25"]),
        (other_store, ["store: 0123/manifest.json differs"]),
        (bad_step_aside, ["checkpoint 1 was quarantined"]),
    ],
)
def test_a_difference_is_named(tmp_path, change, named):
    expected, found = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    change(found)
    lines = differences(expected, found, 2)
    assert len(lines) == len(named)
    for line, start in zip(lines, named, strict=True):
        assert line.startswith(start)
