"""Check 25 with the real trainer: a bad override, a crash, and a rerun of the sweep."""

import os
from pathlib import Path

import pytest
from small_run import ROOT, SMALL
from trainer import OVERRIDES

from launch.runs import expand
from moe_jax.record.lock import lock_workdir

RUN = SMALL | OVERRIDES | {"train.steps": 2}


def sweep_of(folder: Path, runs: list[dict]) -> Path:
    every = [
        {"config": "configs/tiny.py"} | {f"config.{k}": v for k, v in run.items()} for run in runs
    ]
    path = folder / "six.py"
    path.write_text(f"def get_hyper(hyper):\n    return {every!r}\n")
    return path


@pytest.mark.full
def test_six_runs_one_bad_one_that_crashes(tmp_path, corpus, run_cli):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    late = tmp_path / "late"  # this text does not exist yet, which only the run itself finds out
    good = [RUN | {"data.files": corpus, "seed": seed} for seed in range(4)]
    crashes = RUN | {"data.files": f"{late}/*.txt", "seed": 4}
    bad = RUN | {"data.files": corpus, "model.moe.top_k": 9}
    arguments = ["launch.sweep", f"--sweep={tmp_path / 'six.py'}", "--workdir=runs", "--jobs=2"]

    path = sweep_of(tmp_path, [*good, crashes, bad])
    names = list(expand(str(path)))
    metrics = [tmp_path / "runs" / name / "metrics.jsonl" for name in names]

    # ---- the bad run is refused before the first start; neither it nor the crash stops the others
    done = run_cli(arguments, cwd=tmp_path)
    first = next(line for line in done.out.splitlines() if line.startswith("[1/5] + "))
    before, after = done.out.split(first)
    assert f"{names[5]} is refused: " in before and "top_k is 9 with 8 experts" in before
    assert done.code == 1 and "4 of 5 runs finished" in after, done.out
    assert f"{names[4]}: exit code 1" in after
    *_, last, reason = after.splitlines()
    assert last == "1 of 6 runs refused: fix the sweep file"
    assert reason.startswith(f"  {names[5]}: ")
    assert [file.exists() for file in metrics] == [True] * 4 + [False] * 2
    assert not metrics[5].parent.exists()
    times = [file.stat().st_mtime_ns for file in metrics[:4]]

    # ---- two live runs on one workdir
    os.symlink(Path(corpus).parent, late)
    with lock_workdir(metrics[4].parent):
        done = run_cli(arguments, cwd=tmp_path)
    assert done.code == 1 and "is in use by process" in done.out, done.out

    # ---- rerun with the bad run fixed: only runs that have not finished are started
    path = sweep_of(tmp_path, [*good, crashes, RUN | {"data.files": corpus, "seed": 5}])
    fixed = tmp_path / "runs" / list(expand(str(path)))[5] / "metrics.jsonl"
    done = run_cli(arguments, cwd=tmp_path)
    assert done.code == 0 and "2 of 2 runs finished" in done.out, done.out
    assert done.out.count("has finished: skipped") == 4
    assert metrics[4].exists() and fixed.exists()
    assert [file.stat().st_mtime_ns for file in metrics[:4]] == times
