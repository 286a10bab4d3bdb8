"""Compares training in bfloat16 with float32 from one seed, and with another seed as a scale.

    python -m benchmarks.numerics [--float8] [--config=configs/tiny.py] [--steps=300] [--seeds=1]
        [--config.model.moe.dispatch=dropless ...]

Each run is `python -m moe_jax train` in a separate process; further arguments go to all runs.  The
language-model loss is smoothed over 20 steps, and each run is compared with the first, in float32:
largest and mean relative difference of the smoothed losses, and the last one.  A run like the first
with another seed (other weights, other order of the data) shows differences that do not matter in
practice; --seeds= leaves it out.  On a GPU or TPU float32 matmuls use the highest precision.

--float8 compares float8 experts with bfloat16 ones instead, dropless.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.jobs import end_with_children
from moe_jax.files.formats import table

ROOT = Path(__file__).resolve().parents[1]
WINDOW = 20  # steps
QUIET = ("eval.every=0", "eval.rows=32", "eval.samples=0", "checkpoint.every_steps=0")


@dataclasses.dataclass(frozen=True)
class Run:
    """The settings in which the runs differ."""

    name: str
    precision: str
    seed: str = "0"
    overrides: tuple[str, ...] = ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--float8", action="store_true", help="float8 experts beside bfloat16")
    parser.add_argument("--config", default=str(ROOT / "configs" / "tiny.py"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", default="1", help="seeds of further runs like the first")
    given, rest = parser.parse_known_args()
    end_with_children()
    shared = [f"--config={given.config}", f"--config.train.steps={given.steps}", *rest]
    seeds = [seed for seed in given.seeds.split(",") if seed]
    rows = [["run", "largest", "at step", "mean", "at the end", "last smoothed loss"]]
    reference: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for run in float8_runs(seeds) if given.float8 else precision_runs(seeds):
            print(f"{run.name} ...", flush=True)
            found = smoothed(train(Path(folder) / run.name, run, shared))
            reference = reference or found
            rows.append([run.name, *differences(reference, found), f"{found[-1]:.4f}"])
            print(*rows[-1], flush=True)
    print(f"\n{table(rows, left=1)}")


def precision_runs(seeds: list[str]) -> list[Run]:
    """List the runs; the others are compared with the first."""
    others = [Run(f"float32, seed {seed}", "float32", seed) for seed in seeds]
    return [Run("float32", "float32"), Run("bfloat16", "bfloat16"), *others]


def float8_runs(seeds: list[str]) -> list[Run]:
    """List the runs with --float8: all dropless in bfloat16, the second with float8 experts."""
    plain = Run("bfloat16", "bfloat16", overrides=("model.moe.dispatch=dropless",))
    narrow = dataclasses.replace(
        plain, name="float8", overrides=(*plain.overrides, "model.moe.matmul=float8")
    )
    others = [
        dataclasses.replace(plain, name=f"bfloat16, seed {seed}", seed=seed) for seed in seeds
    ]
    return [plain, narrow, *others]


def differences(reference: list[float], found: list[float]) -> list[str]:
    """Format the largest relative difference, its step, the mean, and the last difference."""
    far = [abs(b - a) / a for a, b in zip(reference, found, strict=True)]
    worst = far.index(max(far))
    mean = statistics.mean(far)
    return [f"{far[worst]:.3%}", str(worst + WINDOW), f"{mean:.3%}", f"{far[-1]:.3%}"]


def train(workdir: Path, run: Run, arguments: list[str]) -> list[float]:
    """Train one run and return the language-model loss of each step."""
    own = (f"precision={run.precision}", f"seed={run.seed}", *run.overrides)
    command = [
        *(sys.executable, "-m", "moe_jax", "train"),
        f"--workdir={workdir}",
        "--config.train.log_every=1",
        *(f"--config.{value}" for value in (*QUIET, *own)),
        *arguments,
    ]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    if run.precision == "float32":
        env["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row["lm_loss"] for row in rows if "loss" in row]


def smoothed(losses: list[float]) -> list[float]:
    """The moving average of the losses over WINDOW steps."""
    sums = [0.0, *itertools.accumulate(losses)]
    return [(b - a) / WINDOW for a, b in zip(sums, sums[WINDOW:], strict=False)]


if __name__ == "__main__":
    main()
