"""Trains the same model on several meshes and prints a table that compares their losses.

    python benchmarks/mesh_curves.py [--precision=float32] [--steps=20]
        [--config.model.moe.router=gshard ...]

Each row is an independent run of `python -m moe_jax train --config=configs/tiny.py` from the same
seed, on one device or on eight virtual ones.  Further arguments go to every run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "tiny.py"
LAYOUTS = {
    "1 device": {},
    "data 8": {"data": 8},
    "expert 8": {"expert": 8},
    "data 2 x expert 4": {"data": 2, "expert": 4},
    "fsdp 2 x expert 2 x tensor 2": {"fsdp": 2, "expert": 2, "tensor": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--steps", type=int, default=20)
    given, rest = parser.parse_known_args()
    print("| mesh | accumulation | loss, step 1 | loss, last step | largest difference | counts |")
    print("|---|---|---|---|---|---|")
    reference = None
    with tempfile.TemporaryDirectory() as folder:
        for name, mesh in LAYOUTS.items():
            for accumulation in (1, 4):
                arguments = [
                    f"--config.precision={given.precision}",
                    f"--config.train.steps={given.steps}",
                    f"--config.optimizer.warmup_steps={given.steps // 2}",
                    f"--config.train.accumulation={accumulation}",
                    *rest,
                ]
                rows = train(Path(folder), mesh, arguments)
                reference = reference or rows
                print(line(name, accumulation, rows, reference), flush=True)


def train(folder: Path, mesh: dict[str, int], arguments: list[str]) -> list[dict]:
    """Train one run and return its rows of metrics.jsonl."""
    workdir = Path(tempfile.mkdtemp(dir=folder))
    axes = {"data": 1} | mesh
    command = [
        *(sys.executable, "-m", "moe_jax", "train", f"--config={CONFIG}", f"--workdir={workdir}"),
        "--config.train.log_every=1",
        "--config.eval.every=0",
        "--config.eval.rows=32",
        "--config.eval.samples=0",
        *(f"--config.mesh.{axis}={size}" for axis, size in axes.items()),
        f"--devices={8 if mesh else 1}",
        *arguments,
    ]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    rows = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def line(name: str, accumulation: int, rows: list[dict], reference: list[dict]) -> str:
    """Format one row of the table; differences are to the first run, over all steps."""
    pairs = list(zip(rows, reference, strict=True))
    apart = max(abs(row["loss"] - other["loss"]) for row, other in pairs)
    counts = ("assignments", "kept", "dropped", "unsampled", "padding")
    differing = sum(any(row[c] != other[c] for c in counts) for row, other in pairs)
    equal = "equal" if not differing else f"differ in {differing} steps"
    first, last = rows[0]["loss"], rows[-1]["loss"]
    return f"| {name} | {accumulation} | {first:.7f} | {last:.7f} | {apart:.1e} | {equal} |"


if __name__ == "__main__":
    main()
