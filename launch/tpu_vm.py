"""TPU VMs: python -m launch.tpu_vm COMMAND --name=NAME --zone=ZONE [OPTIONS] [-- ARGUMENTS]

  create    request the VM (a queued resource) and wait for it; its start-up script prepares every
            host and, with ARGUMENTS of python -m moe_jax train, trains
  install   prepare every host now
  run       create the VM, or use the existing one; train, follow the run, and request another VM
            if this one is preempted; ends with the run's exit code
  status    print the VM's state and the run's last line
  logs      print the run's output
  stop      end the run with a checkpoint
  delete    delete the VM

The start-up script starts the run, so a VM that restarts resumes by itself, from a workdir that
must outlive the VM (gs://).  On each host launch/supervise.py restarts a lost trainer.

  python -m launch.tpu_vm run --name=mixtral --zone=us-east5-a --accelerator_type=v5p-256 --spot \\
      --runtime_version=v2-alpha-tpuv5 --repository=https://github.com/ME/moe_jax -- \\
      --config=configs/mixtral_8x7b.py --workdir=gs://BUCKET/mixtral
"""

import dataclasses
import re
import time
from collections.abc import Sequence
from pathlib import Path

from launch import host
from launch.job import Job
from launch.shell import (
    LaunchError,
    Shell,
    add_options,
    flag_of,
    make_parser,
    option,
    read_options,
    run_main,
    split_arguments,
)

# States of a queued resource (Cloud TPU API, QueuedResourceState).
_COMING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
_READY = "ACTIVE"
_SILENCES = 20  # unanswered requests to a host in a row after which we give up


@dataclasses.dataclass(frozen=True)
class TpuOptions:
    """What to request from Cloud TPU, and how to prepare a host."""

    zone: str = option(..., "Zone.")
    project: str = option("", "Project; empty: the one in gcloud's configuration.")
    accelerator_type: str = option("", "Such as v5p-256; needed to create.")
    runtime_version: str = option("", "Such as v2-alpha-tpuv5; needed to create.")
    node_count: int = option(1, "Slices; more than one is multislice.", least=1)
    spot: bool = option(False, "Spot capacity.")
    reserved: bool = option(False, "Reserved capacity.")
    gcloud: tuple[str, ...] = option((), "Another flag for create, such as --gcloud=--network=net.")
    repository: str = option("", "Git URL of moe_jax, readable by the hosts.")
    revision: str = option(
        "main", "Branch, tag or commit; only a commit stays the same at a restart."
    )
    prepare: str = option("", "Your script (a file) that prepares a host, instead of --repository.")
    python: str = option(f"{host.FOLDER}/venv/bin/python", "The Python on a host.")
    directory: str = option(f"{host.FOLDER}/source", "Checkout in which a host trains.")
    wait_minutes: float = option(60.0, "Minutes to wait for a VM.")
    poll_seconds: float = option(30.0, "Seconds between two requests to Cloud TPU.")
    recreate: int = option(10, "Times that a VM which was taken away is requested again.")
    max_stuck: int = option(3, "Restarts in a row on a host without a later checkpoint.", least=1)
    scripts: str = option("runs/tpu_vm", "Folder for start-up scripts, on this machine.")


def launch(job: Job, options: TpuOptions, shell: Shell) -> None:
    """Request a VM named after the job, which trains once it is up; do not wait for it.

    Raises:
      LaunchError: the request is incomplete, or gcloud refused it.
    """
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,60}[a-z0-9])?", job.name):
        raise LaunchError(
            f"--name={job.name} cannot name a VM: begin with a letter, end with a letter or digit, "
            f"at most 62 characters."
        )
    for name in ("accelerator_type", "runtime_version"):
        if not getattr(options, name):
            raise LaunchError(f"--{name} is missing: a VM cannot be requested without it.")
    if options.spot and options.reserved:
        raise LaunchError("--spot and --reserved exclude each other: give one.")
    workdir = flag_of(job.arguments, "workdir")
    if job.arguments and not workdir.startswith("gs://"):
        shell.say(f"warning: --workdir={workdir} must outlive the VM: use gs:// or a network disk")
    path = Path(options.scripts, f"{job.name}.sh")
    shell.write(path, _startup(job, options))
    if options.node_count == 1:
        nodes = [f"--node-id={job.name}"]
    else:
        nodes = [f"--node-count={options.node_count}", f"--node-prefix={job.name}"]
    capacity = [f"--{name}" for name in ("spot", "reserved") if getattr(options, name)]
    _gcloud(
        shell,
        options,
        "create",
        job.name,
        *nodes,
        f"--accelerator-type={options.accelerator_type}",
        f"--runtime-version={options.runtime_version}",
        f"--metadata-from-file=startup-script={path}",
        *capacity,
        *options.gcloud,
        "--async",
    )


def run(job: Job, options: TpuOptions, shell: Shell) -> int:
    """Train on the job's VM to the end; return the exit code.  Creates the VM if there is none.

    Raises:
      LaunchError: no VM within `wait_minutes`, a VM that was taken away more than `recreate` times,
        or one that does not answer.
    """
    if not job.arguments:
        raise LaunchError("There is nothing to run: give the trainer's arguments after `--`.")
    if _state(job.name, options, shell):
        if not wait(job.name, options, shell):
            _ask_again(job, options, shell)
        else:
            _start(job, options, shell)
    else:
        launch(job, options, shell)
    if shell.dry_run:
        return 0
    for again in range(options.recreate + 1):
        code = _follow(job, options, shell)
        if code is not None:
            shell.say(f"{job.name}: exit code {code}; the VM exists until you delete it")
            return code
        if again < options.recreate:
            shell.say(
                f"{job.name} was taken away: requested again ({again + 1} of {options.recreate})"
            )
            _ask_again(job, options, shell)
    raise LaunchError(f"{job.name} was taken away {options.recreate + 1} times: run this again.")


def wait(name: str, options: TpuOptions, shell: Shell) -> bool:
    """Wait for the VM and print its state; return False if it failed or was taken away.

    Raises:
      LaunchError: it was not ready within `wait_minutes`.
    """
    began = time.monotonic()
    while (state := _state(name, options, shell)) in _COMING and not shell.dry_run:
        minutes = (time.monotonic() - began) / 60
        if minutes >= options.wait_minutes:
            raise LaunchError(
                f"{name} is {state} after {minutes:.0f} minutes and stays queued: run this again "
                f"to keep waiting, or delete it."
            )
        shell.say(f"{name}: {state}, {minutes:.1f} of {options.wait_minutes:g} minutes")
        time.sleep(options.poll_seconds)
    shell.say(f"{name}: {state or 'no such VM'}")
    return state == _READY


def delete(name: str, options: TpuOptions, shell: Shell) -> None:
    """Delete the VM and its nodes."""
    _gcloud(shell, options, "delete", name, "--force")


def _ask_again(job: Job, options: TpuOptions, shell: Shell) -> None:
    delete(job.name, options, shell)
    launch(job, options, shell)


def _follow(job: Job, options: TpuOptions, shell: Shell) -> int | None:
    """Wait for the run's exit code; return None if the VM is preempted first."""
    silences = 0
    while wait(job.name, options, shell):
        try:
            answer = _on_first(shell, options, job.name, host.progress())
            state, line = host.read_progress(answer)
            silences = 0
        except LaunchError as error:  # the VM boots, or is being taken away
            silences += 1
            if silences == _SILENCES:
                raise
            state, line = "running", f"no answer: {error}"
        if state == "idle":  # it booted with a start-up script that does not start this run
            _start(job, options, shell)
        elif state != "running":
            return int(state)
        shell.say(f"{job.name}: {line or 'being prepared'}")
        time.sleep(options.poll_seconds)
    return None


def _start(job: Job, options: TpuOptions, shell: Shell) -> None:
    """Run the start-up script now, on every host; a busy host ignores it."""
    _everywhere(shell, options, job.name, host.as_root(_startup(job, options)))


def _state(name: str, options: TpuOptions, shell: Shell) -> str:
    """The state of the queued resource; "" if it does not exist."""
    try:
        return _gcloud(shell, options, "describe", name, "--format=value(state.state)")
    except LaunchError as error:
        if "NOT_FOUND" in error.stderr:
            return ""
        raise


def _startup(job: Job, options: TpuOptions) -> str:
    parts = [_prepare(options)]
    if job.arguments:
        parts.append(
            host.train(options.python, options.directory, job.arguments, options.max_stuck)
        )
    return host.script(*parts)


def _prepare(options: TpuOptions) -> str:
    if options.prepare:
        try:
            return host.prepare_with(Path(options.prepare).read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise LaunchError(
                f"--prepare={options.prepare} cannot be read ({error}): name a script."
            ) from None
    if not options.repository:
        raise LaunchError("The hosts need moe_jax: give --repository, or a script as --prepare.")
    return host.prepare(options.repository, options.revision)


def _everywhere(shell: Shell, options: TpuOptions, name: str, command: str) -> None:
    """Run a command on every host of every slice; its output goes to the screen."""
    where = ("--node=all", "--worker=all", f"--command={command}")
    _gcloud(shell, options, "ssh", name, *where, show=True)


def _on_first(
    shell: Shell, options: TpuOptions, name: str, command: str, show: bool = False
) -> str:
    where = ("--node=0", "--worker=0", f"--command={command}")
    return _gcloud(shell, options, "ssh", name, *where, show=show)


def _gcloud(shell: Shell, options: TpuOptions, verb: str, *rest: str, show: bool = False) -> str:
    project = [f"--project={options.project}"] if options.project else []
    where = [f"--zone={options.zone}", *project, "--quiet"]
    command = ("gcloud", "compute", "tpus", "queued-resources", verb, *rest, *where)
    return shell.run(*command, show=show)


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    own, trainers = split_arguments(argv)
    commands = ("create", "install", "run", "status", "logs", "stop", "delete")
    parser = make_parser("python -m launch.tpu_vm", __doc__)
    parser.add_argument("command", choices=commands)
    parser.add_argument("--name", required=True, help="Name of the VM: [a-z0-9-]+.")
    parser.add_argument("--dry_run", action="store_true", help="Print everything, run nothing.")
    parser.add_argument("--follow", action="store_true", help="logs: keep printing new output.")
    add_options(parser, TpuOptions)
    given = parser.parse_args(own)
    shell, options = Shell(given.dry_run), read_options(TpuOptions, given)
    job = Job(given.name, trainers)
    if given.command == "create":
        launch(job, options, shell)
        return 0 if shell.dry_run or wait(job.name, options, shell) else 1
    if given.command == "run":
        return run(job, options, shell)
    if given.command == "install":
        _everywhere(shell, options, job.name, host.as_root(host.script(_prepare(options))))
    elif given.command == "status":
        state = _state(job.name, options, shell)
        shell.say(f"{job.name}: {state or 'no such VM'}")
        if state == _READY:
            shell.say(_on_first(shell, options, job.name, host.progress()))
    elif given.command == "logs":
        _on_first(shell, options, job.name, host.output(given.follow), show=True)
    elif given.command == "stop":
        _everywhere(shell, options, job.name, host.stop())
    elif given.command == "delete":
        delete(job.name, options, shell)
    return 0


if __name__ == "__main__":
    run_main(main)
