"""Checks that a resumed run is bitwise equal to an uninterrupted one, and times determinism.

    python -m benchmarks.deterministic [--variants=off,deterministic] [--steps=40]
        [--bench=configs/bench_mixtral_2b.py] [--config.model.attention=xla ...]

Each variant trains configs/tiny.py in bfloat16, dropless, with a checkpoint halfway.  The widths
are multiples of 128, so on a Hopper GPU the grouped matmuls are the Mosaic kernels.  The first run
is compared with two others, in every number of every step and the SHA-256 of the last parameters:

    resumed   the same command in a new process, on a copy of the workdir without its last
              checkpoint; compared from the resumed step on
    again     the same run in a new workdir; compared from the first step on

Then `python -m moe_jax bench` is timed on --bench (empty: not timed).  Further arguments go to the
training runs.  JAX's compile cache is off, so that a new process chooses its kernels itself.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.jobs import end_with_children
from moe_jax.files.formats import table

ROOT = Path(__file__).resolve().parents[1]
# name -> train.deterministic, XLA_FLAGS
VARIANTS = {
    "off": (False, ""),
    "exclude": (False, "--xla_gpu_exclude_nondeterministic_ops=true"),
    "deterministic": (True, ""),
}
TINY = {
    "precision": "bfloat16",
    "model.moe.dispatch": "dropless",
    "optimizer.schedule": "constant",
    "train.log_every": 1,
    "train.ledger_every": 0,
    "eval.every": 0,
    "eval.rows": 32,
    "eval.samples": 0,
}
NUMBERS = ("loss", "lm_loss", "balance_loss", "grad_norm", "kept", "dropped")
HEADER = ["variant", "resumed", "again", "step ms", "TFLOP/s", "compile s"]
WHERE = (
    "import jax; from moe_jax.ops.mosaic import choose; d = jax.devices()[0];"
    "print(f'{d.device_kind}, jax {jax.__version__}, Mosaic kernels: {choose.runs_here()}')"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", default="off,deterministic")
    parser.add_argument("--steps", type=int, default=40, help="even; the copy resumes at half")
    parser.add_argument("--bench", default=str(ROOT / "configs" / "bench_mixtral_2b.py"))
    parser.add_argument("--bench_steps", type=int, default=20)
    given, rest = parser.parse_known_args()
    end_with_children()
    where = python(["-c", WHERE], "").strip()
    print(where, flush=True)
    rows = [HEADER]
    with tempfile.TemporaryDirectory() as folder:
        for name in given.variants.split(","):
            cells = bitwise(Path(folder) / name, VARIANTS[name], given.steps, rest)
            if given.bench:
                cells += cost(Path(folder) / name, VARIANTS[name], given.bench, given.bench_steps)
            rows.append([name, *cells, *[""] * (len(HEADER) - 1 - len(cells))])
            print(*rows[-1], flush=True)
    print(f"\n{where}\n\n{table(rows, left=3)}")


def bitwise(folder: Path, variant: tuple[bool, str], steps: int, rest: list[str]) -> list[str]:
    """Make the cells `resumed` and `again`."""
    first, copy, again = folder / "first", folder / "copy", folder / "again"
    train(first, variant, steps, rest)
    shutil.copytree(first, copy)
    shutil.rmtree(copy / "checkpoints" / str(steps))
    train(copy, variant, steps, rest)
    train(again, variant, steps, rest)
    return [
        difference(first, copy, steps),
        difference(first, again, steps),
    ]


def train(workdir: Path, variant: tuple[bool, str], steps: int, rest: list[str]) -> None:
    deterministic, xla_flags = variant
    values = TINY | {
        "train.deterministic": deterministic,
        "train.steps": steps,
        "checkpoint.every_steps": steps // 2,
    }
    arguments = [
        *("-m", "moe_jax", "train", f"--config={ROOT / 'configs' / 'tiny.py'}"),
        f"--workdir={workdir}",
        f"--config.data.store={workdir.parents[1] / 'stores'}",
        *(f"--config.{key}={value}" for key, value in values.items()),
        *rest,
    ]
    lines = python(arguments, xla_flags).splitlines()
    last = next(line for line in reversed(lines) if line.startswith("step"))
    print(f"{workdir.parent.name}/{workdir.name}: {last}", flush=True)


def difference(first: Path, second: Path, steps: int) -> str:
    """Return "bitwise", or the first step that differs and the difference of the last losses."""
    ours, theirs = numbers(first), numbers(second)
    differ = [step for step in sorted(ours.keys() | theirs.keys()) if ours[step] != theirs[step]]
    same = digest(first, steps) == digest(second, steps)
    if same and not differ:
        return "bitwise"
    last = abs(ours[steps][0] - theirs[steps][0])
    return f"differs at step {differ[0] if differ else '-'}, last loss by {last:.1e}"


def numbers(workdir: Path) -> dict[int, list[float]]:
    """The logged numbers of each step; of a resumed run, also those before the resume."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: [row[name] for name in NUMBERS] for row in rows if "loss" in row}


def digest(workdir: Path, step: int) -> str:
    """The SHA-256 of the parameters of a checkpoint."""
    command = ["-m", "moe_jax", "checkpoint", f"--workdir={workdir}", "--verify"]
    lines = python(command, "").splitlines()
    return next(line.split()[-1] for line in lines if line.startswith(f"step {step} "))


def cost(folder: Path, variant: tuple[bool, str], config: str, steps: int) -> list[str]:
    """Make the cells: milliseconds per step, model TFLOP/s, seconds to compile."""
    deterministic, xla_flags = variant
    arguments = [
        *("-m", "moe_jax", "bench", f"--config={config}", f"--workdir={folder / 'bench'}"),
        f"--config.data.store={folder.parent / 'stores'}",
        "--config.model.moe.dispatch=dropless",
        f"--config.train.deterministic={deterministic}",
        f"--steps={steps}",
    ]
    row = json.loads(python(arguments, xla_flags).splitlines()[-1])
    return [str(row[key]) for key in ("step_ms", "model_tflops_per_s", "compile_seconds")]


def python(arguments: list[str], xla_flags: str) -> str:
    """Run a new Python and return its output; exit with its last lines if it fails."""
    env = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {xla_flags}".strip()
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{arguments} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
