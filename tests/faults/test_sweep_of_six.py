"""Check 25 with the trainer itself: a bad override, a crash, and what a rerun does again."""

import os
import re
from pathlib import Path

import pytest
from small_run import ROOT, SMALL
from trainer import OVERRIDES

from launch.runs import expand
from moe_jax.train.lock import alone_in

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
    late = tmp_path / "late"  # this text is not there yet: only the run itself finds out
    good = [RUN | {"data.files": corpus, "seed": seed} for seed in range(4)]
    crashes = RUN | {"data.files": f"{late}/*.txt", "seed": 4}
    bad = RUN | {"data.files": corpus, "model.moe.top_k": 9}
    arguments = ["launch.sweep", f"--sweep={tmp_path / 'six.py'}", "--workdir=runs", "--jobs=2"]

    # ---- the bad one is refused by name, and nothing starts
    path = sweep_of(tmp_path, [*good, crashes, bad])
    *_, name = expand(str(path))
    done = run_cli(arguments, cwd=tmp_path)
    assert done.code == 1 and "1 of 6 runs cannot start, so none was started" in done.err
    assert re.search(rf"^{re.escape(name)}: .*top_k is 9 with 8 experts", done.err, re.MULTILINE)
    assert not (tmp_path / "runs").exists()

    # ---- mended: the crash costs no other run
    path = sweep_of(tmp_path, [*good, crashes, RUN | {"data.files": corpus, "seed": 5}])
    names = list(expand(str(path)))
    metrics = [tmp_path / "runs" / name / "metrics.jsonl" for name in names]
    done = run_cli(arguments, cwd=tmp_path)
    assert done.code == 1 and "5 of 6 runs have come to their end" in done.out, done.out
    assert f"{names[4]}: exit code 1" in done.out
    assert [file.exists() for file in metrics] == [True] * 4 + [False, True]
    times = [file.stat().st_mtime_ns for file in metrics if file.exists()]

    # ---- two live runs on one workdir
    os.symlink(Path(corpus).parent, late)
    with alone_in(metrics[4].parent):
        done = run_cli(arguments, cwd=tmp_path)
    assert done.code == 1 and "is in use by process" in done.out, done.out

    # ---- again: only what has failed
    done = run_cli(arguments, cwd=tmp_path)
    assert done.code == 0, done.out
    assert done.out.count("is at its end: skipped") == 5
    assert metrics.pop(4).exists()
    assert [file.stat().st_mtime_ns for file in metrics] == times
