"""Does training in bfloat16 follow float32?  Two runs from one seed, and a third as yardstick.

    python benchmarks/numerics.py [--steps=300] [--seeds=1]
        [--config.model.moe.dispatch=dropless ...]

Each run is `python -m moe_jax.train --config=configs/tiny.py` in a process of its own; further
arguments go to all of them.  The language-model loss is smoothed over 20 steps, and each run is
compared with the one in float32: largest and mean relative difference of the smoothed losses.
A run in float32 from another seed (other weights, other order of the data) shows how far apart
losses are that nobody would tell apart; --seeds= leaves it out.  On a GPU or TPU float32 is meant
in full: products at the highest precision.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from moe_jax.markdown import table

ROOT = Path(__file__).resolve().parents[1]
WINDOW = 20  # steps
QUIET = ("eval.every=0", "eval.batches=1", "eval.samples=0", "checkpoint.every_steps=0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", default="1", help="of further runs in float32")
    given, rest = parser.parse_known_args()
    rows = [["run", "largest", "at step", "mean", "last smoothed loss"]]
    with tempfile.TemporaryDirectory() as folder:

        def losses(name: str, precision: str, seed: str) -> list[float]:
            print(f"{name} ...", flush=True)
            values = {"precision": precision, "seed": seed, "train.steps": given.steps}
            arguments = [f"--config.{key}={value}" for key, value in values.items()]
            return smoothed(train(Path(folder) / name, precision, [*arguments, *rest]))

        reference = losses("float32", "float32", "0")
        rows.append(["float32", "", "", "", f"{reference[-1]:.4f}"])
        runs = [("bfloat16", "bfloat16", "0")]
        runs += [(f"float32, seed {s}", "float32", s) for s in given.seeds.split(",") if s]
        for name, precision, seed in runs:
            found = losses(name, precision, seed)
            far = [abs(b - a) / a for a, b in zip(reference, found, strict=True)]
            worst = far.index(max(far))
            cells = [f"{far[worst]:.3%}", str(worst + WINDOW), f"{statistics.mean(far):.3%}"]
            rows.append([name, *cells, f"{found[-1]:.4f}"])
            print(*rows[-1], flush=True)
    print(f"\n{table(rows, left=1)}")


def train(workdir: Path, precision: str, arguments: list[str]) -> list[float]:
    """The language-model loss of each step of one run."""
    command = [
        *(sys.executable, "-m", "moe_jax.train"),
        f"--config={ROOT / 'configs' / 'tiny.py'}",
        f"--workdir={workdir}",
        "--config.train.log_every=1",
        *(f"--config.{value}" for value in QUIET),
        *arguments,
    ]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    if precision == "float32":
        env["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row["lm_loss"] for row in rows if "loss" in row]


def smoothed(losses: list[float]) -> list[float]:
    """Means of each WINDOW losses in a row."""
    sums = [0.0, *itertools.accumulate(losses)]
    return [(b - a) / WINDOW for a, b in zip(sums, sums[WINDOW:], strict=False)]


if __name__ == "__main__":
    main()
