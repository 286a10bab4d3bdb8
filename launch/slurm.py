"""Slurm: python -m launch.slurm --name=NAME [OPTIONS] -- ARGUMENTS OF python -m moe_jax train

Writes a batch script, submits it and prints the job's id.  The processes find each other through
Slurm.  Each runs under launch/supervise.py, which restarts a lost process on its node.  A job that
stopped with a checkpoint (at the time limit, for example) or lost a node is requeued.  Both resume
from the workdir, which every node must see.

  python -m launch.slurm --name=olmoe --nodes=4 --gpus_per_node=8 --time=12:00:00 -- \\
      --config=configs/olmoe_1b_7b.py --workdir=/shared/runs/olmoe
"""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from launch.job import AGAIN, Job, supervised
from launch.shell import (
    LaunchError,
    Shell,
    add_options,
    make_parser,
    option,
    read_options,
    run_main,
    split_arguments,
)


@dataclasses.dataclass(frozen=True)
class SlurmOptions:
    """The resources that a job requests from Slurm, and its restart policy."""

    nodes: int = option(1, "Nodes per job.", least=1)
    processes_per_node: int = option(
        1, "1, or the number of GPUs for one process per GPU.", least=1
    )
    gpus_per_node: int = option(0, "GPUs per node; 0: none.")
    cpus_per_process: int = option(0, "Cores per process; 0: Slurm's default.")
    memory: str = option("", "Memory per node, such as 64G; empty: Slurm's default.")
    time: str = option("", "Time limit in Slurm's format; the job is then requeued.")
    partition: str = option("", "Partition.")
    account: str = option("", "Account to charge.")
    sbatch: tuple[str, ...] = option((), "Another flag for sbatch, such as --sbatch=--qos=low.")
    at_once: int = option(0, "Jobs of an array that may run at once; 0: all.")
    python: str = option("python", "The Python that has moe_jax, on every node.")
    directory: str = option(".", "Checkout in which the trainer runs, on every node.")
    logs: str = option("runs/slurm", "Folder for scripts and output, which every node must see.")
    max_restarts: int = option(100, "Times that a job may be requeued.")
    max_stuck: int = option(3, "Restarts in a row on a node without a later checkpoint.", least=1)


# Runs one process.  Slurm sends SIGTERM to this bash as well; because of the trap it waits for the
# supervisor.  Each exit code goes to a file, because srun reports only the largest: that of a
# process that must not be restarted (1, 3) would be masked by its peers, which wait for it until
# srun kills them (137).
_PROCESS = (
    'trap : TERM; folder=$1; shift; "$@"; code=$?; '
    'echo "$code" >"$folder/$SLURM_PROCID"; exit "$code"'
)

_RUN = """\
restarts="${{SLURM_RESTART_COUNT:-0}}"
echo "$(date -Is) $name: job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart $restarts"
codes="$(mktemp -d {logs}/codes.XXXXXX)" || exit 1
# A process whose supervisor has ended is not restarted, so its peers get two minutes to end.
srun --label --kill-on-bad-exit=0 --wait=120 \\
  bash -c {process} process "$codes" {supervised} "${{arguments[@]}}"
code=$?
fatal="$(cat "$codes"/* 2>/dev/null | grep -vxE '0|{again}' | head -n 1)"
rm -rf "$codes"
echo "$(date -Is) $name: exit code ${{fatal:-$code}}"
[ -z "$fatal" ] || exit "$fatal"
case "$code" in
  {again})
    if [ "$restarts" -ge {max_restarts} ]; then
      echo "$name: restarted {max_restarts} times, giving up"
      exit "$code"
    fi
    exec scontrol requeue "$SLURM_JOB_ID"
    ;;
esac
exit "$code"
"""


def script(jobs: Sequence[Job], options: SlurmOptions) -> str:
    """Write the batch script of one job, or of an array of several."""
    logs = Path(options.directory, options.logs).absolute()
    lines = ["#!/bin/bash", *(f"#SBATCH {shlex.quote(flag)}" for flag in _flags(jobs, options))]
    lines += ["set -u", f"cd {shlex.quote(str(Path(options.directory).absolute()))} || exit 1"]
    lines += ['case "${SLURM_ARRAY_TASK_ID:-0}" in']
    for index, job in enumerate(jobs):
        lines += [f"  {index}) name={job.name}; arguments=({shlex.join(job.arguments)}) ;;"]
    lines += ["esac"]
    run = _RUN.format(
        logs=shlex.quote(str(logs)),
        process=shlex.quote(_PROCESS),
        supervised=shlex.join(supervised(options.python, (), options.max_stuck)),
        again="|".join(map(str, AGAIN)),
        max_restarts=options.max_restarts,
    )
    return "\n".join(lines) + "\n" + run


def _flags(jobs: Sequence[Job], options: SlurmOptions) -> list[str]:
    several = len(jobs) > 1
    folder = Path(options.directory, options.logs).absolute()
    at_once = f"%{options.at_once}" if options.at_once else ""
    flags = {
        "job-name": _name(jobs),
        "nodes": options.nodes,
        "ntasks-per-node": options.processes_per_node,
        "gpus-per-node": options.gpus_per_node,
        "cpus-per-task": options.cpus_per_process,
        "mem": options.memory,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "array": f"0-{len(jobs) - 1}{at_once}" if several else "",
        # Signals the processes, not the script: they save, then the script requeues the job.
        "signal": "TERM@120",
        "output": folder / ("%x-%A_%a.out" if several else "%x-%j.out"),
        "open-mode": "append",  # a requeued job continues its file
    }
    return [
        *(f"--{name}={value}" for name, value in flags.items() if value),
        "--requeue",
        *options.sbatch,
    ]


def _name(jobs: Sequence[Job]) -> str:
    return jobs[0].name if len(jobs) == 1 else f"{jobs[0].name}-and-{len(jobs) - 1}-more"


def submit(jobs: Sequence[Job], options: SlurmOptions, shell: Shell) -> str:
    """Submit one job, or several as one array; return Slurm's job id ("" under dry_run).

    Raises:
      LaunchError: there are no jobs, or sbatch failed.
    """
    if not jobs:
        raise LaunchError("There is no job to submit: give at least one.")
    path = Path(options.directory, options.logs, f"{_name(jobs)}.sh").absolute()
    shell.write(path, script(jobs, options))
    answer = shell.run("sbatch", "--parsable", str(path))
    return answer.partition(";")[0]  # ID, or ID;CLUSTER


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    own, trainers = split_arguments(argv)
    parser = make_parser("python -m launch.slurm", __doc__)
    parser.add_argument("--name", required=True, help="Name of the job: [a-z0-9-]+.")
    parser.add_argument("--dry_run", action="store_true", help="Print everything, run nothing.")
    add_options(parser, SlurmOptions)
    given = parser.parse_args(own)
    if not trainers:
        raise LaunchError("There is nothing to run: give the trainer's arguments after `--`.")
    shell = Shell(given.dry_run)
    identity = submit([Job(given.name, trainers)], read_options(SlurmOptions, given), shell)
    if identity:
        shell.say(f"job {identity}: squeue -j {identity}; output in {given.logs}")
    return 0


if __name__ == "__main__":
    run_main(main)
