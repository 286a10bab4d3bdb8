"""Runs a sweep file: checks all its runs, then starts the valid ones, each in its own workdir.

  python -m launch.sweep --sweep=configs/sweeps/capacity.py --workdir=DIR
      [--backend=local|slurm|tpu_vm] [--dry_run] [OPTIONS OF THE BACKEND]

The same command resumes a sweep: it skips finished runs and resumes the others.  A run that the
trainer would refuse is named, with the reason, before the first run starts and again in the last
lines.  Exit codes: 0 all runs have finished or were handed to the cluster, 1 something needs a fix
(for example a refused run), 42 stopped by a signal: run it again.
A sweep file defines get_hyper(hyper): see launch/hyper.py and configs/sweeps/.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch import runs
from launch.job import Job
from launch.local import LOG, STOPPED, Local, command
from launch.shell import LaunchError, Shell, add_options, make_parser, read_options, run_main
from moe_jax.files.links import check_links

SWEEP_RECORD = "sweep.json"  # in the sweep's workdir: name of each run -> its overrides
_CHECK = [sys.executable, "-m", "moe_jax", "check"]


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    given, options = _flags(argv)
    shell = Shell(given.dry_run)
    named = runs.expand(given.sweep)
    local = given.backend == "local"
    shared = (f"--devices={given.devices}",) if local and given.devices else ()
    jobs = [runs.job(name, run, given.workdir, shared) for name, run in named.items()]

    # ---- every config, before the first run starts
    shell.say(f"{given.sweep}: checking {len(jobs)} runs")
    answers = check(jobs, given.devices)
    refused = {name: a["problem"] for name, a in answers.items() if a["problem"]}
    done = {name: a["changed"] for name, a in answers.items() if a["finished"]}
    for name, problem in refused.items():
        shell.say(f"{name} is refused: {problem}")
    for name, changed in done.items():
        since = f" ({', '.join(changed)} changed since: delete its folder to run it again)"
        shell.say(f"{name} has finished: skipped{since if changed else ''}")
    todo = [job for job in jobs if job.name not in refused and job.name not in done]
    if not given.dry_run and "://" not in given.workdir and len(refused) < len(jobs):
        _write_record(Path(given.workdir), named)

    # ---- start
    try:
        code = _start(todo, given, options, shell) if todo else 0
    finally:  # these are the last lines even if starting the other runs failed
        if refused:
            shell.say(f"{len(refused)} of {len(jobs)} runs refused: fix the sweep file")
        for name, problem in refused.items():
            shell.say(f"  {name}: {problem}")
    return code or int(bool(refused))


def check(jobs: Sequence[Job], devices: int) -> dict[str, dict[str, Any]]:
    """Run `python -m moe_jax check` on all jobs.

    Args:
      jobs: all jobs of the sweep.
      devices: per run; 0: those of this machine.

    Returns:
      Name of each job -> the answer, with keys problem, finished and changed.

    Raises:
      LaunchError: the check itself failed.
    """
    lines = "".join(json.dumps(_without_devices(job.arguments)) + "\n" for job in jobs)
    process = subprocess.run(
        [*_CHECK, f"--devices={devices}"], input=lines, text=True, stdout=subprocess.PIPE
    )
    answers = [json.loads(line) for line in process.stdout.splitlines()]
    if process.returncode or len(answers) != len(jobs):
        raise LaunchError(
            f"The configs could not be checked ({shlex.join(_CHECK)} ended with exit code "
            f"{process.returncode}): its message is above."
        )
    return {job.name: answer for job, answer in zip(jobs, answers, strict=True)}


def _without_devices(arguments: Sequence[str]) -> list[str]:
    return [argument for argument in arguments if not argument.startswith("--devices=")]


def _start(jobs: Sequence[Job], given: Any, options: Any, shell: Shell) -> int:
    """Run the jobs on this machine or hand them to a cluster; under dry_run, print them."""
    if given.backend != "local":
        _backend(given.backend)[1](jobs, options, shell)
        return 0
    if given.dry_run:
        for job in jobs:
            shell.say(f"+ {shlex.join(command(job))}")
        return 0
    return _run_here(jobs, Path(given.workdir), given, shell)


def _run_here(jobs: Sequence[Job], workdir: Path, given: Any, shell: Shell) -> int:
    """Run the jobs on this machine and print how each of them ended."""
    local = Local(workdir, given.jobs, shell.say)
    codes = local.run(jobs)
    ended = [job for job in jobs if codes[job.name] == 0]
    answers = check(ended, given.devices) if ended else {}
    done = {name for name, answer in answers.items() if answer["finished"]}
    failed = {name: code for name, code in codes.items() if name not in done}
    shell.say(f"{len(done)} of {len(jobs)} runs finished")
    for name, code in failed.items():
        how = {
            None: "not started",
            0: "exit code 0, not finished",
            STOPPED: "stopped, to be resumed",
        }
        shell.say(f"  {name}: {how.get(code, f'exit code {code}')} ({workdir / name / LOG})")
    if local.stopping and failed:
        shell.say("stopped: run the same command again to resume")
        return STOPPED
    return 1 if failed else 0


def _write_record(workdir: Path, named: dict[str, runs.Run]) -> None:
    try:
        check_links(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / SWEEP_RECORD).write_text(json.dumps(named, indent=1) + "\n")
    except OSError as error:
        raise LaunchError(
            f"--workdir={workdir} cannot be written ({error.strerror or error}): give another."
        ) from None


def _flags(argv: Sequence[str]) -> tuple[argparse.Namespace, Any]:
    """Parse the sweep's flags and the options of its backend (None for this machine)."""
    parser = make_parser("python -m launch.sweep", __doc__)
    parser.add_argument("--sweep", required=True, help="A file with get_hyper(hyper).")
    parser.add_argument("--workdir", required=True, help="Each run gets a folder in it.")
    parser.add_argument("--backend", choices=("local", "slurm", "tpu_vm"), default="local")
    parser.add_argument("--dry_run", action="store_true", help="Check and print, start nothing.")
    parser.add_argument(
        "--devices",
        type=int,
        default=0,
        help="Devices per run: on this machine virtual CPU devices, on a cluster real ones.",
    )
    parser.add_argument("--jobs", type=int, default=1, help="Runs at a time on this machine.")
    backend = parser.parse_known_args(argv)[0].backend
    if backend == "local":
        given, options = parser.parse_args(argv), None
    else:
        kind = _backend(backend)[0]
        add_options(parser, kind)
        given = parser.parse_args(argv)
        options = read_options(kind, given)
        if given.devices < 1:
            raise LaunchError(f"--devices is missing: give the devices per run on {backend}.")
    if given.jobs < 1 or given.devices < 0:
        raise LaunchError("--jobs must be at least 1, and --devices at least 0: change them.")
    if not given.workdir:  # each run's folder would be created in /
        raise LaunchError("--workdir is empty: name a folder for the runs.")
    given.workdir = os.path.expanduser(given.workdir)
    return given, options


def _backend(name: str) -> tuple[type, Callable[[Sequence[Job], Any, Shell], None]]:
    """The options of a cluster, and the function that hands it the jobs.

    Both are imported here because runs on this machine need neither.
    """
    if name == "slurm":
        from launch import slurm

        def submit(jobs: Sequence[Job], options: Any, shell: Shell) -> None:
            identity = slurm.submit(jobs, options, shell)
            if identity:
                shell.say(f"job {identity}: squeue -j {identity}")

        return slurm.SlurmOptions, submit
    from launch import tpu_vm

    def create(jobs: Sequence[Job], options: Any, shell: Shell) -> None:
        refused = 0
        for job in jobs:
            try:
                tpu_vm.launch(job, options, shell)
            except LaunchError as error:  # for example: the VM exists already
                shell.say(f"{job.name}: {error}")
                refused += 1
        if refused:
            raise LaunchError(
                f"{refused} of {len(jobs)} runs got no VM, for the reasons above. Fix them and run "
                f"this again."
            )

    return tpu_vm.TpuOptions, create


if __name__ == "__main__":
    run_main(main)
