"""Every file of a run except its checkpoints, on a disk that is full for a while.

A writer whose file the run needs raises one sentence; any other prints it and the run continues.
Neither changes a byte that was written before.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import jax
import jax.numpy as jnp
import pytest
from no_room import no_room
from small_run import flags, rows, small_config, write_corpus

from moe_jax.checkpoint import Checkpoints
from moe_jax.cli.train import main
from moe_jax.config import to_json
from moe_jax.errors import UserError
from moe_jax.parallel.distributed import DONE
from moe_jax.parallel.mesh import MeshConfig, make_mesh
from moe_jax.record.lock import lock_workdir
from moe_jax.record.provenance import write_run_record
from moe_jax.record.report import LEDGER, METRICS, Reporter
from moe_jax.record.rewind import Rewinds
from moe_jax.record.settings import record_settings
from moe_jax.run.control import Control
from moe_jax.run.flight import FlightRecorder
from moe_jax.run.loop import SAMPLES
from moe_jax.run.samples import save_samples
from moe_jax.train.step import StepMetrics
from moe_jax.watch.profile import Profiler
from moe_jax.watch.timekeeper import GOODPUT, Timekeeper

Say = Callable[[str], None]
Write = Callable[[int], None]  # writes for the n-th time


def reporter_rows(workdir: Path, say: Say) -> Write:
    reporter = Reporter(workdir, 9, None)

    def write(n: int) -> None:
        reporter.log({"step": n, "loss": 1.0})
        reporter.ledger({"step": n})
        reporter.flush()

    return write


def goodput(workdir: Path, say: Say) -> Write:
    return Timekeeper(workdir, True, beat=1e9).resumed


def record(workdir: Path, say: Say) -> Write:
    return lambda n: write_run_record(str(workdir), to_json(small_config("*", seed=n)), {}, "abc")


def settings(workdir: Path, say: Say) -> Write:
    mesh = make_mesh(MeshConfig())
    return lambda n: record_settings(workdir, small_config("*", seed=n), mesh, n)


def rewinds(workdir: Path, say: Say) -> Write:
    checkpoints = SimpleNamespace(
        pin=lambda step: None,
        latest_good_before=lambda step: 0,
        set_aside_after=lambda step, report: None,
    )
    made = Rewinds(workdir, checkpoints, say)
    return lambda n: made.go_back(changed=n, last=n, why="NaN") and None


def samples(workdir: Path, say: Say) -> Write:
    return lambda n: save_samples(workdir / SAMPLES, [f"text {n}"], say)


def flight(workdir: Path, say: Say) -> Write:
    recorder = FlightRecorder(SimpleNamespace(workdir=workdir), None, None, say)
    recorder._record = lambda step, why: {"data_step": step}

    def write(n: int) -> None:
        recorder.saw(n, cast(StepMetrics, object.__new__(StepMetrics)))  # its fields are not used
        recorder.write("NaN")

    return write


def lock(workdir: Path, say: Say) -> Write:
    def write(n: int) -> None:
        with lock_workdir(workdir, say):
            pass

    return write


def profile(workdir: Path, say: Say) -> Write:
    def write(n: int) -> None:
        if n == 3:
            jax.profiler.stop_trace()  # JAX keeps a failed trace open
        profiler = Profiler(range(9), workdir / str(n), say)
        profiler.toggle()
        jax.block_until_ready(jnp.ones(9) + n)
        profiler.close()

    return write


NEEDED = {"record": record, "settings": settings, "rewinds": rewinds}
SAID = {"samples": samples, "flight": flight, "profile": profile}
# The next row of goodput has all the numbers; the kernel's lock does not depend on the file.
SILENT = {"goodput": goodput, "lock": lock}
PRINTED = {"reporter": reporter_rows}
WRITERS = NEEDED | SAID | SILENT | PRINTED


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_costs_nothing_that_was_whole(tmp_path, capsys, name):
    said: list[str] = []
    write = WRITERS[name](tmp_path, said.append)
    write(1)
    before, error = contents(tmp_path), ""
    assert before
    said.clear()
    with no_room(2):
        try:
            write(2)
        except UserError as raised:
            error = str(raised)
    after = contents(tmp_path)
    growing = {METRICS, LEDGER, GOODPUT}
    for path, held in before.items():
        if path.name in growing or "tfevents" in path.name:
            assert after[path].startswith(held)
        elif path.name != "lock":
            assert after[path] == held, path
    told = [*said, error, *capsys.readouterr().out.splitlines()]
    assert any("make room" in line for line in told) == (name not in SILENT), told
    assert bool(error) == (name in NEEDED)
    write(3)
    now = contents(tmp_path)
    assert name == "lock" or any(now[path] != before.get(path) for path in now)
    assert not [path for path in now if path.suffix == ".new"]


@pytest.mark.lifecycle
def test_a_run_goes_on_where_all_but_its_checkpoints_find_no_room(tmp_path, capsys, monkeypatch):
    """The disk is full from step 3 to step 7, with two evaluations between them."""
    workdir, corpus = tmp_path / "run", write_corpus(tmp_path / "text")
    disk, calls = no_room(), []
    after = Control.after

    def fills(self, done, preemption):
        if done == 3:  # by now everything is compiled and in JAX's cache
            disk.__enter__()
        if done == 7:
            disk.__exit__(None, None, None)
        return after(self, done, preemption)

    monkeypatch.setattr(Control, "after", fills)
    for kind, name in ((Checkpoints, "save"), (Checkpoints, "close"), (Reporter, "flush")):
        monkeypatch.setattr(kind, name, noted(calls, name, getattr(kind, name)))
    monkeypatch.setattr(Reporter, "close", noted(calls, "end of the rows", Reporter.close))
    overrides = {"eval.every": 2, "train.ledger_every": 1, "model.num_layers": 1}
    command = flags(workdir, corpus, **overrides | {"model.moe.every": 1})
    assert main(["train", *command]) == DONE
    found = rows(workdir)
    assert [row["step"] for row in found if "loss" in row] == [*range(1, 9)]
    assert [row["step"] for row in found if "eval_loss" in row] == [2, 4, 6, 8]
    ledger = [json.loads(line) for line in (workdir / LEDGER).read_text().splitlines()]
    assert [row["step"] for row in ledger] == [*range(1, 9)]
    assert (workdir / SAMPLES).exists()
    out = capsys.readouterr().out
    assert out.count("make room") == out.count("is written again.") == 3
    # Rows that take long to copy must not delay the save of a step.
    assert calls == ["save", "flush", "close", "end of the rows"]


def noted(calls: list[str], name: str, function: Callable[..., object]) -> Callable[..., object]:
    def call(*arguments):
        calls.append(name)
        return function(*arguments)

    return call
