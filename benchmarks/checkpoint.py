"""Times saving, hashing and restoring, and how long a save blocks the next step of a run.

    python -m benchmarks.checkpoint [--folder=DIR] [--gib=1,4] [--configs=configs/tiny.py,...]

Prints two tables.  The first is for states of --gib GiB of float32, in leaves of 64 MiB, in DIR
(default: the system's temporary folder; all files are removed):

    save         MiB/s until the step is committed, with and without the SHA-256 manifest
    blocks s     seconds until the call returns
    restore      MiB/s into arrays: hashed while loaded, as in a run; hashed and then loaded;
                 unverified.  The files are dropped from the page cache before each.

The second trains 40 steps of each config with a checkpoint every 10 steps, and compares the longest
save call with the median step.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from moe_jax.checkpoint import Checkpoints, manifest
from moe_jax.cli import train as trainer
from moe_jax.files.formats import table
from moe_jax.run import loop

LEAF = (8, 1024, 2048)  # experts x width x expert width, 64 MiB
LEAVES_PER_GIB = 16
STEPS, EVERY = 40, 10
RUN = {
    "train.steps": STEPS,
    "train.log_every": 1,
    "checkpoint.every_steps": EVERY,
    "eval.every": 0,
    "eval.rows": 32,
    "eval.samples": 0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--gib", default="1,4")
    parser.add_argument("--configs", default="configs/tiny.py,configs/cpu_small.py:32")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        sizes = [int(size) for size in given.gib.split(",") if size]
        rows = [bandwidth(Path(folder), size) for size in sizes]
        if rows:
            header = ["GiB", "save", "no manifest", "blocks s"]
            header += ["restore", "hashed, then loaded", "unverified"]
            print(f"MiB/s, {given.folder}\n\n{table([header, *rows], left=0)}\n", flush=True)
        runs = [blocked(Path(folder), name) for name in given.configs.split(",") if name]
        if runs:
            print(table([["config", "MiB", "step s", "save blocks s", "in steps"], *runs], left=1))


def bandwidth(folder: Path, gib: int) -> list[str]:
    """Measure one row of the first table."""
    mib = gib * 1024
    make = jax.jit(lambda key: jax.random.normal(key, LEAF))
    keys = jax.random.split(jax.random.key(gib), gib * LEAVES_PER_GIB)
    tree: Any = {"params": {f"w_{i:03d}": make(key) for i, key in enumerate(keys)}}
    jax.block_until_ready(tree)

    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)

    # ---- save; the first save is not timed, because it waits for fresh memory
    saved(folder / "first", tree)
    Checkpoints(folder / "first").restore_latest(lambda _: like)
    shutil.rmtree(folder / "first")
    without: dict[str, Any] = dict.fromkeys(("write", "seal"), lambda directory: None)
    with mock.patch.multiple(manifest, **without):
        plain, _ = saved(folder / "plain", tree)
    shutil.rmtree(folder / "plain")
    hashed, blocks = saved(folder / "hashed", tree)

    # ---- restore
    del tree
    checkpoints = Checkpoints(folder / "hashed")

    def hashed_then_loaded() -> Any:
        assert checkpoints.latest_good() == 1
        return checkpoints.restore(1, like)

    ways = (
        lambda: checkpoints.restore_latest(lambda _: like),
        hashed_then_loaded,
        lambda: checkpoints.restore(1, like),
    )
    restores = [cold(folder, way) for way in ways]
    checkpoints.close()
    shutil.rmtree(folder / "hashed")
    seconds = (hashed, plain, *restores)
    speeds = [f"{mib / s:.0f}" for s in seconds]
    return [str(gib), speeds[0], speeds[1], f"{blocks:.2f}", *speeds[2:]]


def saved(root: Path, tree: Any) -> tuple[float, float]:
    """Save; return the seconds until the step is committed, and until the call returns."""
    checkpoints = Checkpoints(root)
    began = time.perf_counter()
    checkpoints.save(1, tree)
    blocks = time.perf_counter() - began
    checkpoints.close()
    return time.perf_counter() - began, blocks


def cold(folder: Path, read: Callable[[], Any]) -> float:
    """The seconds of `read` without the files in the page cache (except on a tmpfs)."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    jax.block_until_ready(read())
    return time.perf_counter() - began


def blocked(folder: Path, config: str) -> list[str]:
    """Measure one row of the second table."""
    workdir = folder / "run"
    seconds = []

    def timed(*arguments: Any) -> None:
        began = time.perf_counter()
        save(*arguments)
        seconds.append(time.perf_counter() - began)

    save = loop.save
    values = [f"--config.{name}={value}" for name, value in RUN.items()]
    store = f"--config.data.store={folder / 'stores'}"
    with mock.patch.object(loop, "save", timed):
        trainer.main(["train", f"--config={config}", f"--workdir={workdir}", store, *values])
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    step = statistics.median(r["step_seconds"] for r in map(json.loads, lines) if "loss" in r)
    mib = Checkpoints(workdir / "checkpoints").size(STEPS) / 2**20
    shutil.rmtree(workdir)
    longest = max(seconds)
    return [config, f"{mib:.0f}", f"{step:.2f}", f"{longest:.2f}", f"{longest / step:.2f}"]


if __name__ == "__main__":
    main()
