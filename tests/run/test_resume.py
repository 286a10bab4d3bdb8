"""A run that is stopped and started again is the run that was never stopped."""

import dataclasses
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from small_run import ONE_LAYER, eval_rows, flags, rows, small_config, train_rows, write_corpus

from moe_jax.checkpoint import Checkpoints
from moe_jax.checkpoint.tree import array_digest, named_leaves
from moe_jax.cli.train import main
from moe_jax.config import to_json
from moe_jax.errors import UserError
from moe_jax.parallel.distributed import AGAIN, DONE
from moe_jax.record.provenance import write_run_record
from moe_jax.run.context import Run
from moe_jax.run.control import Control
from moe_jax.run.loop import save
from moe_jax.run.origin import check_origin
from moe_jax.run.restore import restore_or_init_state
from moe_jax.run.setup import prepare
from moe_jax.train.state import TrainState, to_disk

STEPS = 80
EVERY = 10
# A router with state, groups that 8 devices do not split, and a learning rate that does not depend
# on the number of steps.
OVERRIDES = {
    **ONE_LAYER,
    "model.moe.router": "sigmoid_bias",
    "model.moe.options.sigmoid_bias.update_rate": 0.01,
    "train.steps": STEPS,
    "checkpoint.every_steps": EVERY,
    "model.moe.group_rows": 4,
    "optimizer.schedule": "constant",
    "eval.samples": 0,
}
PIPE = 4096  # bytes of a pipe: far fewer lines than a run of STEPS prints
NUMBERS = ("loss", "grad_norm", "kept", "dropped", "learning_rate", "tokens", "mean_loss")


class Process:
    """The trainer in a process of its own, on one device; killed on leaving the `with` block.

    It cannot run ahead, because it blocks once its output pipe, of one page, is full.
    """

    def __init__(self, arguments: list[str], env: dict[str, str]):
        reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE)
        self._lines = os.fdopen(reader, "rb", buffering=0)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moe_jax", "train", *arguments],
            env=env,
            stdout=writer,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(writer)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._lines.close()
        self._process.communicate()

    def _read(self) -> Iterator[str]:
        for line in self._lines:
            yield line.decode()

    def wait_for(self, text: str) -> None:
        """Read its output up to a line that begins with `text`."""
        seen = []
        for line in self._read():
            seen.append(line)
            if line.startswith(text):
                return
        pytest.fail(f"no line {text!r} in:\n{''.join(seen)}{self._errors()}")

    def signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)

    def finish(self) -> int:
        """Read the rest of its output; returns its exit code."""
        for _ in self._read():
            pass
        return self._process.wait(timeout=120)

    def _errors(self) -> str:
        assert self._process.stderr is not None
        return self._process.stderr.read().decode()


@pytest.fixture(autouse=True)
def sigterm():
    """Restore the SIGTERM handler, which the trainer replaces until its process ends."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("resume") / "text")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, corpus, cli_env):
    """The workdir of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    with Process(flags(folder, corpus, **OVERRIDES), cli_env) as process:
        assert process.finish() == DONE
    return folder


def checkpoints(workdir: Path) -> Checkpoints:
    return Checkpoints(workdir / "checkpoints")


def numbers(logged: list[dict]) -> list[list[float]]:
    return [[row[name] for name in ("step", *NUMBERS)] for row in logged]


def ready(workdir: Path, corpus: str, devices: int, **overrides: object) -> Run:
    config = small_config(corpus, **OVERRIDES | overrides)
    return prepare(config, workdir, lambda line: None, jax.devices()[:devices])


def restored(run: Run, init_from: str = "") -> TrainState:
    return restore_or_init_state(run, init_from, lambda line: None)


def digest(run: Run, state: TrainState) -> str:
    """The digest of the parameters in memory."""
    leaves = named_leaves(to_disk(state, run.model.layout)["params"])
    return array_digest((name, np.asarray(leaves[name])) for name in sorted(leaves))


@pytest.mark.lifecycle
def test_sigkill(tmp_path, corpus, straight, cli_env):
    command = flags(tmp_path / "run", corpus, **OVERRIDES)
    with Process(command, cli_env) as process:
        # The save of step 20 waits for that of step 10.
        process.wait_for(f"step {2 * EVERY + 1}/")
        process.signal(signal.SIGKILL)
        assert process.finish() == -signal.SIGKILL
    saved = checkpoints(tmp_path / "run").steps()
    assert saved and EVERY <= saved[-1] < STEPS
    assert not eval_rows(tmp_path / "run")

    with Process(command, cli_env) as process:
        process.wait_for(f"resuming from step {saved[-1]}")
        assert process.finish() == DONE
    assert numbers(train_rows(tmp_path / "run")) == numbers(train_rows(straight))
    assert eval_rows(tmp_path / "run") == eval_rows(straight)
    found, expected = checkpoints(tmp_path / "run"), checkpoints(straight)
    assert found.verify(STEPS) is None
    for name in ("params", "optimizer"):
        assert found.digest(STEPS, name) == expected.digest(STEPS, name)


def test_sigterm_and_then_another_number_of_steps(tmp_path, corpus, straight, cli_env):
    command = flags(tmp_path / "run", corpus, **OVERRIDES)
    with Process(command, cli_env) as process:
        process.wait_for("step 3/")
        process.signal(signal.SIGTERM)
        assert process.finish() == AGAIN
    stopped = checkpoints(tmp_path / "run").steps()[-1]
    assert stopped == train_rows(tmp_path / "run")[-1]["step"] < STEPS

    command = flags(tmp_path / "run", corpus, **OVERRIDES | {"train.steps": stopped + 2})
    with Process(command, cli_env) as process:
        process.wait_for(f"resuming from step {stopped}")
        assert process.finish() == DONE
    expected = numbers(train_rows(straight))[: stopped + 2]
    assert numbers(train_rows(tmp_path / "run")) == expected
    assert [row["step"] for row in eval_rows(tmp_path / "run")] == [stopped + 2]


@pytest.mark.lifecycle
def test_another_mesh(tmp_path, corpus, straight):
    shutil.copytree(straight, tmp_path / "run")
    mesh = {"mesh.data": 1, "mesh.expert": 8}
    run = ready(tmp_path / "run", corpus, 8, **mesh)
    assert digest(run, restored(run)) == checkpoints(straight).digest(STEPS)

    more = OVERRIDES | mesh | {"train.steps": STEPS + 3}
    assert main(["train", *flags(tmp_path / "run", corpus, **more)]) == DONE
    logged = train_rows(tmp_path / "run")
    assert numbers(logged[:STEPS]) == numbers(train_rows(straight))
    assert [row["step"] for row in logged[STEPS:]] == [STEPS + 1, STEPS + 2, STEPS + 3]
    assert max(abs(row["loss"] - logged[STEPS - 1]["loss"]) for row in logged[STEPS:]) < 0.1
    assert checkpoints(tmp_path / "run").steps()[-1] == STEPS + 3


def contents(workdir: Path) -> dict[str, bytes]:
    """Every file of a workdir except its lock, which names the last process."""
    files = (path for path in workdir.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(workdir)): path.read_bytes() for path in files}


def test_a_finished_run(tmp_path, corpus, straight, capsys):
    """Only the last work, which a kill may have interrupted, is repeated, and only once."""
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    whole = rows(workdir)
    metrics = workdir / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join(lines[:-1]))
    command = ["train", *flags(workdir, corpus, **OVERRIDES)]
    assert main(command) == DONE
    assert f"step {STEPS} of {STEPS} is done" in capsys.readouterr().out
    assert rows(workdir)[:-1] == whole[:-1]
    assert rows(workdir)[-1]["eval_loss"] == pytest.approx(whole[-1]["eval_loss"], rel=1e-5)

    before = contents(workdir)
    other = {"optimizer.learning_rate": 1.0, "eval.every": 7, "train.steps": STEPS - 1}
    for overrides in ({}, other):
        capsys.readouterr()
        assert main(["train", *flags(workdir, corpus, **OVERRIDES | overrides)]) == DONE
        assert contents(workdir) == before
        said = capsys.readouterr().out
        assert f"nothing to train: {workdir} is unchanged" in said
        keys = "optimizer.learning_rate, train.steps, eval.every"
        assert (f"is unchanged; these keys had no effect: {keys}\n" in said) == bool(overrides)
        for key in other:
            assert (f"{key} was " in said) == bool(overrides), said


@pytest.mark.parametrize("replaced", [pytest.param(False, marks=pytest.mark.lifecycle), True])
def test_a_lock_that_is_gone_ends_the_run_before_its_next_save(
    tmp_path, corpus, monkeypatch, replaced
):
    workdir = tmp_path / "run"
    after = Control.after

    def remove(self, done, preemption):
        if done == EVERY + 3:
            (workdir / "lock").unlink()
            if replaced:
                (workdir / "lock").write_text("process 1 on another host")
        return after(self, done, preemption)

    monkeypatch.setattr(Control, "after", remove)
    with pytest.raises(UserError, match="lock was removed or replaced while this run held it"):
        main(["train", *flags(workdir, corpus, **OVERRIDES)])
    assert checkpoints(workdir).steps() == [EVERY]


def test_stop_file(tmp_path, corpus):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STOP").touch()
    assert main(["train", *flags(tmp_path / "run", corpus, **OVERRIDES)]) == DONE
    assert [row["step"] for row in rows(tmp_path / "run")] == [1]
    assert checkpoints(tmp_path / "run").steps() == [1]
    assert not (tmp_path / "run" / "STOP").exists()  # the next attempt must not stop at once


def test_init_from(tmp_path, corpus, straight):
    """Only the weights of the other run are taken; they also fit a scanned model."""
    new = ready(tmp_path / "run", corpus, 8, seed=5)
    state = restored(new, str(straight))
    assert digest(new, state) == checkpoints(straight).digest(STEPS)
    assert int(state.step) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.optimizer))
    assert np.any(state.router["bias"])


@pytest.mark.lifecycle
def test_init_from_a_router_with_another_state(tmp_path, corpus, straight):
    """State that only one of the two routers has is reset or dropped; weights are kept."""
    lines = []
    without = ready(tmp_path / "without", corpus, 1, model__moe__router="top_k")
    state = restore_or_init_state(without, str(straight), lines.append)
    assert state.router == {} and digest(without, state) == checkpoints(straight).digest(STEPS)
    assert lines[1:] == [
        "router state reset: this run's router keeps none, the router of that run kept bias"
    ]

    save(without, state, 1)
    without.checkpoints.close()
    write_run_record(str(without.workdir), to_json(without.config), {}, without.store.fingerprint)
    lines = []
    biased = ready(tmp_path / "biased", corpus, 1)
    state = restore_or_init_state(biased, str(without.workdir), lines.append)
    assert not np.any(state.router["bias"])
    assert digest(biased, state) == checkpoints(straight).digest(STEPS)
    assert lines[1:] == [
        "router state reset: this run's router keeps bias, the router of that run kept none"
    ]

    noisy = ready(tmp_path / "noisy", corpus, 1, model__moe__router="noisy_top_k")
    assert "model.moe.router was 'sigmoid_bias', is 'noisy_top_k'" in check_origin(
        noisy.config, str(straight)
    )
    with pytest.raises(UserError, match="router_noise_kernel is absent in the checkpoint"):
        restore_or_init_state(noisy, str(straight), lines.append)


@pytest.mark.lifecycle
@pytest.mark.parametrize("scanned_first", [True, pytest.param(False, marks=pytest.mark.full)])
def test_scanned_and_unrolled_layers(tmp_path, corpus, scanned_first):
    layers = {"model.num_layers": 4, "model.moe.every": 2}
    first = ready(tmp_path / "run", corpus, 1, **layers, model__scan_layers=scanned_first)
    state = restored(first)
    distinct = jax.tree.map(
        lambda x: x + np.arange(x.size, dtype=x.dtype).reshape(x.shape), state.optimizer
    )
    state = dataclasses.replace(state, step=state.step + 3, optimizer=distinct)
    save(first, state, 3)
    first.checkpoints.close()
    write_run_record(str(first.workdir), to_json(first.config), {}, first.store.fingerprint)
    second = ready(tmp_path / "run", corpus, 2, **layers, model__scan_layers=not scanned_first)
    back = restored(second)
    assert jax.tree.structure(back) != jax.tree.structure(state)
    assert digest(second, back) == digest(first, state)
    jax.tree.map(
        np.testing.assert_array_equal,
        to_disk(back, second.model.layout),
        to_disk(state, first.model.layout),
    )
