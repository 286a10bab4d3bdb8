"""Checks and times everything in docs/performance.md, and prints tables at the end.

    python -m benchmarks.gpu --logs=FOLDER [--only=grouped_matmul,step] [--batches=4,8,16]

Each measurement is a separate process with a time limit, so a failure does not affect the others.
With several GPUs, jobs that need one GPU run side by side, and jobs bound by the host, such as
compile times, run alone.  FOLDER keeps the output of every process and report.md, which is updated
after every job and printed at the end.  `--small` runs the whole script on a CPU with a tiny model.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts import PARTS, Given, Step, jobs_of, text
from benchmarks.jobs import Job, Outcome, last_json, last_table, run_job, schedule
from moe_jax.files.formats import table

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = tuple(f"{ROOT}/configs/bench_{name}.py" for name in ("mixtral_2b", "olmoe_half"))
SMALL = tuple(
    f"--config.{key}"
    for key in (
        "model.num_layers=1",
        "model.width=64",
        "model.moe.expert_width=64",
        "data.sequence_length=64",
    )
)
# With --small nearly all time is compilation.
SMALL_ENV = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
COUNT = "import jax; print(jax.local_device_count() if jax.default_backend() == 'gpu' else 0)"
# Other figures of a step, which are not parts of its time.
BESIDE = {
    "collectives_hidden_ms": "collectives beside other kernels",
    "collectives_sent_mb": "sent, MB",
}
START_KEYS = ("first_step_seconds", "compile_seconds")


def main() -> None:
    given = parse()
    if given.list:
        print("\n".join(f"{name}: {part.__doc__}" for name, part in PARTS.items()))
        return
    env = environment(given.small)
    devices = visible(env, given.small)
    folder = Path(given.logs).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        made = settings(given, Path(scratch))
        jobs = jobs_of(given.only.split(","), made)
        if given.one_at_a_time:
            devices = devices[: max(job.devices for job in jobs)]
            jobs = [dataclasses.replace(job, alone=True) for job in jobs]
        print(f"{len(jobs)} jobs, devices {', '.join(devices)}", flush=True)

        def work(job: Job, taken: Sequence[str]) -> Outcome:
            own = {} if given.small else {"CUDA_VISIBLE_DEVICES": ",".join(taken)}
            return run_job(job, env | own, given.limit, folder)

        def keep(outcomes: Mapping[str, Outcome]) -> None:
            (folder / "report.md").write_text(report(jobs, outcomes))

        schedule([text(made)], devices[:1], work, _say)
        outcomes = schedule(jobs, devices, work, _say, keep)
    print(f"\n{report(jobs, outcomes)}")
    sys.exit(any(outcome.error for outcome in outcomes.values()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--logs", default="gpu_logs", help="folder for the processes' output")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--list", action="store_true", help="list the parts and exit")
    parser.add_argument("--configs", default=",".join(CONFIGS))
    parser.add_argument("--batches", default="4,8,16", help="rows per GPU, in parts with several")
    parser.add_argument("--batch", type=int, default=8, help="rows per GPU, in the other parts")
    parser.add_argument("--steps", type=int, default=20, help="timed steps per process")
    parser.add_argument("--limit", type=float, default=400, help="time limit of a job, in seconds")
    parser.add_argument("--one-at-a-time", action="store_true", help="leave other GPUs idle")
    parser.add_argument("--small", action="store_true", help="a tiny model on a CPU")
    given = parser.parse_args()
    unknown = [name for name in given.only.split(",") if name not in PARTS]
    if unknown:
        parser.error(f"{unknown[0]!r} is not a part: use {', '.join(PARTS)}")
    return given


def settings(given: argparse.Namespace, scratch: Path) -> Given:
    """Make the settings of the parts from the command line."""
    return Given(
        configs=(f"{ROOT}/configs/tiny.py",) if given.small else tuple(given.configs.split(",")),
        batches=(4,) if given.small else tuple(int(batch) for batch in given.batches.split(",")),
        batch=4 if given.small else given.batch,
        steps=3 if given.small else given.steps,
        overrides=SMALL if given.small else (),
        small=given.small,
        scratch=scratch,
    )


def environment(small: bool) -> dict[str, str]:
    """The environment of every process; the user's own variables take precedence."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    defaults = {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",  # no other process uses the GPU
        "NCCL_NVLS_ENABLE": "0",
        **(SMALL_ENV if small else {}),
    }
    return defaults | {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def visible(env: Mapping[str, str], small: bool) -> list[str]:
    """List the GPUs as CUDA_VISIBLE_DEVICES names them; with `small` the CPU is two devices."""
    if small:
        return ["0", "1"]
    # Ask in another process, because a process that has used a GPU keeps some of its memory.
    done = subprocess.run(
        [sys.executable, "-c", COUNT], env={**env}, stdout=subprocess.PIPE, text=True, check=False
    )
    count = 0 if done.returncode else int(done.stdout.split()[-1])
    if not count:
        sys.exit("Error: JAX finds no GPU: add --small to run on a CPU.")
    named = env.get("CUDA_VISIBLE_DEVICES") or ",".join(str(number) for number in range(count))
    return named.split(",")[:count]


def report(jobs: Sequence[Job], outcomes: Mapping[str, Outcome]) -> str:
    """Format all results so far in Markdown."""
    jobs, parts = [job for job in jobs if job.name in outcomes], []
    for job in jobs:
        found = "".join(outcomes[job.name].outputs)
        if not isinstance(job, Step) and last_table(found):
            parts.append(f"## {job.name}\n\n{last_table(found)}")
    rows = {
        job.name: row
        for job in jobs
        if isinstance(job, Step)
        if (row := last_json("".join(outcomes[job.name].outputs)))
    }
    if rows:
        steps = [job for job in jobs if isinstance(job, Step)]
        parts.append(f"## Whole steps\n\n{table(step_rows(steps, rows), left=1)}")
        parts.append(f"## Device time of a step, ms\n\n{table(profile_rows(rows), left=1)}")
    starts = start_rows(jobs, outcomes)
    if len(starts) > 1:
        parts.append(f"## First step, seconds after the process began\n\n{table(starts, left=1)}")
    ends = [[name, one.error or "done", f"{one.seconds:.0f}"] for name, one in outcomes.items()]
    parts.append(f"## Jobs\n\n{table([['job', 'outcome', 'seconds'], *ends], left=2)}")
    return "\n\n".join(parts) + "\n"


def step_rows(jobs: Sequence[Step], rows: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Format the speed of every job of whole steps; `ratio`: tokens/s over those of `against`."""
    found = [["job", "ms", "TFLOP/s", "tokens/s", "GiB", "loss", "dropped", "ratio", "against"]]
    for job in jobs:
        row, unit = rows.get(job.name), rows.get(job.against)
        if row is None:
            found.append([job.name, "failed", *["-"] * (len(found[0]) - 2)])
            continue
        ratio = f"{row['tokens_per_s'] / unit['tokens_per_s']:.3f}" if unit else "-"
        found.append(
            [
                job.name,
                f"{row['step_ms']:.1f}",
                f"{row['model_tflops_per_s']:.4g}",
                f"{row['tokens_per_s']:,}",
                f"{row['peak_memory_mib'] / 1024:.0f}",
                f"{row['loss']:.4f}",
                f"{row['drop_fraction']:.2%}",
                ratio,
                job.against or "-",
            ]
        )
    return found


def profile_rows(rows: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Format each job's time by part, the part with the largest total first."""
    profiles = {name: row["profile_ms"] for name, row in rows.items() if "profile_ms" in row}
    total: dict[str, float] = {}
    for profile in profiles.values():
        for part, ms in profile.items():
            total[part] = total.get(part, 0.0) + ms
    parts = sorted(total, key=lambda part: -total[part])
    lines = [
        [
            name,
            *(f"{profile[part]:.1f}" if part in profile else "-" for part in parts),
            *(f"{rows[name].get(key, 0.0):.1f}" for key in BESIDE),
        ]
        for name, profile in profiles.items()
    ]
    return [["job", *parts, *BESIDE.values()], *lines]


def start_rows(jobs: Sequence[Job], outcomes: Mapping[str, Outcome]) -> list[list[str]]:
    """Format cold and warm first steps, from jobs that run the same command twice."""
    found = [["job", "cold", "of it compiling", "warm", "of it compiling"]]
    for job in jobs:
        if len(job.commands) == 2:
            rows = [last_json(output) for output in outcomes[job.name].outputs]
            cells = [f"{row[key]:.1f}" for row in rows if row for key in START_KEYS]
            found.append([job.name, *cells, *["-"] * (4 - len(cells))])
    return found


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
