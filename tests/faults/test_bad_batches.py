"""Rewinds past bad batches in real processes: killed during one, two processes, none left."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bad_batches import patches
from small_run import ROOT, flags, train_rows, write_corpus

from moe_jax.checkpoint import Checkpoints
from moe_jax.cli.replay import main as replay_command
from moe_jax.cli.train import main
from moe_jax.parallel.distributed import DIVERGED, DONE
from moe_jax.record.rewind import Rewind, read_rewinds
from moe_jax.record.settings import read_settings

pytestmark = pytest.mark.full

BAD = {step: "nan" for step in (4, 9, 10, 11)}
OVERRIDES = {
    "model.num_layers": 1,
    "model.moe.every": 1,
    "model.moe.router": "sigmoid_bias",
    "model.moe.group_rows": 4,
    "train.steps": 16,
    "train.max_skipped": 2,
    "checkpoint.every_steps": 2,
    "checkpoint.keep_last": 99,
    "eval.rows": 32,
    "eval.samples": 0,
}
EXPECTED = {"step": 8, "data_step": 12, "refused": (10, 12), "skipped": (8, 11)}


@pytest.fixture
def env(cli_env):
    path = os.pathsep.join((str(ROOT / "tests"), cli_env["PYTHONPATH"]))
    return cli_env | {"PYTHONPATH": path}


@pytest.fixture
def start(env):
    """`start(arguments, kill, *more)` starts a trainer with the bad batches.

    All trainers are killed when the test ends.
    """
    started = []

    def begin(arguments: list[str], kill: dict[str, int], *more: str) -> subprocess.Popen:
        plan = json.dumps({"factors": BAD, "kill": kill})
        process = subprocess.Popen(
            [sys.executable, "-m", "bad_batches", plan, *arguments, *more],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def untimed(workdir: Path) -> list[Rewind]:
    return [dataclasses.replace(rewind, time="") for rewind in read_rewinds(workdir)]


def test_killed_at_every_turn_it_takes_the_same_data(tmp_path, start):
    files = write_corpus(tmp_path / "text")
    straight = start(flags(tmp_path / "straight", files, **OVERRIDES), {})
    assert straight.wait(timeout=240) == DONE, straight.communicate()[1]
    (rewind,) = read_rewinds(tmp_path / "straight")
    assert {name: getattr(rewind, name) for name in EXPECTED} == EXPECTED

    kills = (
        {"step": 11},  # among skipped steps
        {"write": 1},  # before the rewind is recorded
        {"quarantine": 1},  # after the rewind is recorded
        {"write": 1},  # at the next start, after the checkpoint was quarantined
        {"step": 4},  # in training after the rewind
    )
    command = flags(tmp_path / "killed", files, **OVERRIDES)
    for kill in kills:
        process = start(command, kill)
        assert process.wait(timeout=240) == -signal.SIGKILL, (kill, process.communicate())
    process = start(command, {})
    assert process.wait(timeout=240) == DONE, process.communicate()[1]

    assert untimed(tmp_path / "killed") == untimed(tmp_path / "straight")
    numbers = [
        [(row["step"], row["loss"], row["grad_norm"], row["mean_loss"]) for row in train_rows(run)]
        for run in (tmp_path / "killed", tmp_path / "straight")
    ]
    assert [row[0] for row in numbers[0]] == list(range(1, 17))
    assert str(numbers[0]) == str(numbers[1])  # "nan" included
    saved = [Checkpoints(tmp_path / run / "checkpoints") for run in ("killed", "straight")]
    for name in ("params", "optimizer", "guard"):
        assert saved[0].digest(16, name) == saved[1].digest(16, name)
    assert saved[0].quarantined() == saved[1].quarantined() == ["10"]


def test_it_goes_back_to_what_was_taken_with_other_settings(tmp_path, start, monkeypatch):
    """A run stops among skipped steps and resumes; every step can be replayed bit for bit."""
    workdir = tmp_path / "run"
    files = write_corpus(tmp_path / "text")
    for steps in (10, 16):
        command = flags(workdir, files, **OVERRIDES | {"train.steps": steps})
        process = start(command, {}, "--devices=8")
        assert process.wait(timeout=240) == DONE, process.communicate()[1]
    assert [settings.after for settings in read_settings(workdir)] == [0, 10, 8]
    assert [s.config["train"]["steps"] for s in read_settings(workdir)] == [10, 16, 16]
    for change in patches({step: float(factor) for step, factor in BAD.items()}, []):
        monkeypatch.setattr(*change)
    for step in (6, 9, 13):
        assert replay_command(["replay", f"--workdir={workdir}", f"--step={step}"]) == 0


def test_two_processes_go_back_together(tmp_path, start):
    """The lead process is killed after it recorded the rewind; both restart and complete it."""
    command = flags(
        tmp_path / "run",
        write_corpus(tmp_path / "text"),
        **OVERRIDES | {"mesh.data": 2, "mesh.expert": 2, "watchdog.step": 60.0},
    )

    def pair(kill: dict[str, int]) -> list[subprocess.Popen]:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        own = ["--devices=2", f"--coordinator=localhost:{port}", "--process_count=2"]
        return [start(command, kill if i == 0 else {}, *own, f"--process_id={i}") for i in (0, 1)]

    first, second = pair({"quarantine": 1})
    assert first.wait(timeout=240) == -signal.SIGKILL
    os.killpg(second.pid, signal.SIGKILL)
    (rewind,) = read_rewinds(tmp_path / "run")
    assert not rewind.settled

    ended = [(one, *one.communicate(timeout=240)) for one in pair({})]
    assert [process.returncode for process, _, _ in ended] == [DONE, DONE], ended
    (rewind,) = read_rewinds(tmp_path / "run")
    assert rewind.settled and {name: getattr(rewind, name) for name in EXPECTED} == EXPECTED
    assert [row["step"] for row in train_rows(tmp_path / "run")] == list(range(1, 17))
    alone = start(
        [flag.replace(f"{tmp_path}/run", f"{tmp_path}/one") for flag in command], {}, "--devices=4"
    )
    assert alone.wait(timeout=240) == DONE, alone.communicate()[1]
    rows = zip(train_rows(tmp_path / "run"), train_rows(tmp_path / "one"), strict=True)
    for two, one in rows:
        assert two["assignments"] == one["assignments"] and two["padding"] == one["padding"]
        assert float(two["loss"]) == pytest.approx(float(one["loss"]), rel=1e-5)


def test_an_update_that_overflows_is_never_saved(tmp_path, monkeypatch, capsys):
    """Loss and gradient of the step are finite, the updated parameters are not."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    hot = {
        "optimizer.learning_rate": 1e39,
        "optimizer.warmup_steps": 0,
        "checkpoint.every_steps": 1,
    }
    command = flags(tmp_path / "run", write_corpus(tmp_path / "text"), **OVERRIDES | hot)
    assert main(["train", *command]) == DIVERGED
    assert "step 1 diverged (the parameters or the optimizer's" in capsys.readouterr().out
    (row,) = train_rows(tmp_path / "run")
    assert not row["skipped"] and np.isfinite([row["loss"], row["grad_norm"]]).all()
    assert not Checkpoints(tmp_path / "run" / "checkpoints").steps()


def test_with_all_rewinds_used_it_ends_with_3_also_when_started_again(
    tmp_path, monkeypatch, capsys
):
    for change in patches(dict.fromkeys(range(7, 99), np.nan), []):
        monkeypatch.setattr(*change)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    command = flags(
        tmp_path / "run",
        write_corpus(tmp_path / "text"),
        **OVERRIDES | {"train.max_rewinds": 1},
    )
    for times in (1, 2):
        assert main(["train", *command]) == DIVERGED
        out = capsys.readouterr().out
        assert ("REWIND 1 of 1" in out) == (times == 1)
        assert "lower optimizer.learning_rate" in out and "(1 of 1 train.max_rewinds" in out
        assert len(read_rewinds(tmp_path / "run")) == 1
    for step in Checkpoints(tmp_path / "run" / "checkpoints").steps():
        assert step < 10
