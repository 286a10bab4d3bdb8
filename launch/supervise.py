"""Runs a trainer and restarts it: python -m launch.supervise [OPTIONS] -- COMMAND ...

  python -m launch.supervise -- python -m moe_jax train --config=configs/tiny.py --workdir=runs/tiny

COMMAND is restarted after exit codes 42, 134, 137 and 143 and after a death by any signal, also by
a crash in native code; each restart prints one line.  After any other code, for example 0, 1 (needs
a fix) or 3 (diverged), the supervisor ends with that code.  It ends with 1 after --max_stuck
restarts in a row without a later checkpoint.  Steps logged after the last checkpoint do not count
as progress, because a restart repeats them.  A rewind of the trainer (rewinds.jsonl) resets the
count.

If another process holds WORKDIR/lock when COMMAND starts, COMMAND ends with 1.  The supervisor then
waits up to --max_in_use seconds for the lock and runs COMMAND again: the trainer of an earlier
supervisor may be frozen, or still writing its last checkpoint.

SIGTERM and Ctrl-C reach COMMAND as one SIGTERM, after which it saves a checkpoint; the supervisor
waits and ends with COMMAND's code.  COMMAND runs in its own session, so that a terminal's Ctrl-C
does not reach it twice, and its stdin is empty.  On Linux the kernel sends COMMAND a SIGTERM if the
supervisor is killed.  A script as COMMAND must `exec` the trainer, or signals do not reach it.

A run of several processes has one supervisor per process, all on the same workdir.  The loss of one
process aborts its peers (134), at the latest when it restarts and the coordinator sees a new
process.  All are then restarted and wait up to five minutes for each other, so --max_wait is below
that.  A process in which the failure of a peer raises an exception (in collectives on CPUs) ends
with 42 and is restarted as well.
"""

import dataclasses
import datetime
import fcntl
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for python launch/supervise.py

from launch.job import AGAIN
from launch.shell import (
    LaunchError,
    add_options,
    flag_of,
    make_parser,
    option,
    print_line,
    read_options,
    run_main,
    split_arguments,
)

GAVE_UP = 1  # a person must look; after 42 or 137 an outer launcher would try again
# Run the same command again: preempted (checkpoint saved), the watchdog fired, or a peer was lost.
# The only code after which the first restart does not wait.
_STOPPED = 42
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_HELPER = Path(__file__).with_name("with_parent.py")
_REFUSED = 1  # the trainer's exit code if its workdir is in use
_LOOK_INTERVAL = 1.0  # seconds between two checks of a lock
_TAIL = 1 << 20  # bytes at the end of metrics.jsonl, longer than any line of it


@dataclasses.dataclass(frozen=True)
class SuperviseOptions:
    """When to restart a command, and how long to wait before that."""

    workdir: str = option("", "Workdir of the run; empty: COMMAND's --workdir.")
    max_stuck: int = option(
        3, "Restarts in a row without a later checkpoint, then give up.", least=1
    )
    wait: float = option(5.0, "Seconds before a restart; doubles until there is progress.")
    max_wait: float = option(120.0, "Most seconds before a restart.")
    max_in_use: float = option(600.0, "Most seconds to wait for a workdir that is in use.")


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    own, command = split_arguments(argv)
    parser = make_parser("launch.supervise", __doc__)
    add_options(parser, SuperviseOptions)
    options = read_options(SuperviseOptions, parser.parse_args(own))
    if not command:
        raise LaunchError("There is nothing to run: give the command after --.")
    workdir = options.workdir or flag_of(command, "workdir")
    if not workdir:
        raise LaunchError("--workdir is missing: progress is read from it. Set --workdir.")
    return Supervisor(command, _folder(workdir), options).run()


class Supervisor:
    """Runs `command` until it is done.  Use it in the main thread, which handles signals."""

    def __init__(self, command: Sequence[str], workdir: Any, options: SuperviseOptions):
        program = shutil.which(command[0])
        if program is None:
            raise LaunchError(f"There is no program {command[0]!r} on PATH: install it.")
        self._command, self._workdir, self._options = list(command), workdir, options
        self._program = os.path.abspath(program)
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = False
        # A pipe ends the wait between two starts.  A signal handler must not use an event, whose
        # lock the waiting thread may hold.
        self._wakes, self._wake = os.pipe()

    def run(self) -> int:
        """Run the command to its end; returns the exit code to end with."""
        before = {number: signal.signal(number, self._stop) for number in _SIGNALS}
        try:
            return self._run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run(self) -> int:
        options = self._options
        best, stuck, restart = (0, 0), 0, 0
        while True:
            holder = lock_holder(self._workdir)
            code = self._once()
            if holder and code == _REFUSED and self._wait_for_lock(holder):
                continue
            if self._stopping or not (code < 0 or code in AGAIN):
                return _handed_on(code)

            # ---- progress
            backs, kept = progress(self._workdir)
            reached = max(kept, reached_step(self._workdir))
            if (backs, kept) > best:
                best, stuck = (backs, kept), 0
            what = f"{reason(code)}; reached step {reached}"
            if stuck == options.max_stuck:
                _say(f"giving up: {what}, no later checkpoint in {stuck} restarts in a row")
                return GAVE_UP

            # ---- restart
            doublings = stuck - (code == _STOPPED)
            # The exponent is capped: 2.0 ** 1024 would overflow.
            growth = 2.0 ** min(doublings, 64)
            seconds = min(options.wait * growth, options.max_wait) if doublings >= 0 else 0.0
            stuck, restart = stuck + 1, restart + 1
            _say(
                f"restart {restart}: {what}, resumes from {kept}, {reached - kept} steps lost, "
                f"waiting {seconds:g} s"
            )
            select.select([self._wakes], [], [], seconds)
            if self._stopping:
                return _handed_on(code)

    def _once(self) -> int:
        """Run the command once; returns its exit code, or minus the signal that ended it."""
        start = self._command
        if sys.platform == "linux":
            # -I -S: environment variables and installed packages do not affect the helper.
            helper = [sys.executable, "-I", "-S", str(_HELPER)]
            start = [*helper, str(os.getpid()), self._program, *self._command]
        self._child = subprocess.Popen(start, stdin=subprocess.DEVNULL, start_new_session=True)
        if self._stopping:  # the signal arrived before the child existed
            self._child.terminate()
        return self._child.wait()

    def _wait_for_lock(self, holder: str) -> bool:
        """Wait until the workdir's lock is free; returns False if that takes too long."""
        limit = self._options.max_in_use
        frozen = " (stopped by a signal: kill -CONT continues it)" if _is_stopped(holder) else ""
        _say(f"workdir in use by {holder}{frozen}; waiting up to {limit:g} s for it")
        end = time.monotonic() + limit
        while (left := end - time.monotonic()) > 0 and not self._stopping:
            select.select([self._wakes], [], [], min(left, _LOOK_INTERVAL))
            if not lock_holder(self._workdir):
                return not self._stopping
        return False

    def _stop(self, *_: object) -> None:
        if not self._stopping:
            os.write(self._wake, b"x")
        self._stopping = True
        if self._child is not None:
            self._child.terminate()


def reason(code: int) -> str:
    """Describe an exit code, or minus a signal, in words."""
    if code == _STOPPED:
        return "asked to be run again (exit code 42)"
    number = -code if code < 0 else code - 128
    name = next((s.name for s in signal.Signals if s == number), f"signal {number}")
    return f"killed by {name}" if code < 0 else f"ended by {name} (exit code {code})"


def reached_step(workdir: Any) -> int:
    """The step in the last whole line of metrics.jsonl; 0: none, or it cannot be read."""
    try:
        with (workdir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().splitlines(keepends=True)
    except Exception:  # each object store's client raises its own errors
        return 0
    for line in reversed(lines):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            continue
        step = row.get("step") if isinstance(row, dict) else None
        if isinstance(step, int):
            return step
    return 0


def progress(workdir: Any) -> tuple[int, int]:
    """(number of rewinds, step that the run resumes from): a greater pair means progress."""
    kept = kept_step(workdir)
    try:
        # The format of moe_jax/record/rewind.py.
        lines = (workdir / "rewinds.jsonl").read_text(encoding="utf-8").splitlines()
        last = json.loads(lines[-1])
        # If the run was killed during a rewind, its next start quarantines later checkpoints.
        return len(lines), kept if last["settled"] else min(kept, int(last["step"]))
    except Exception:  # no file, a damaged file, or an error of an object store's client
        return 0, kept


def lock_holder(workdir: Any) -> str:
    """The live process that holds the workdir's lock, as the lock file names it; "": none."""
    if "://" in os.fspath(workdir):  # an object store has no locks
        return ""
    try:
        # The format of moe_jax/record/lock.py.  O_NONBLOCK: a FIFO of that name must not block us.
        file = os.open(workdir / "lock", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # closing the file releases it
    except BlockingIOError:
        return os.read(file, 200).decode(errors="replace").strip() or "another process"
    except OSError:  # a file system without locks
        return ""
    finally:
        os.close(file)
    return ""


def _is_stopped(holder: str) -> bool:
    """True if the holder of a lock is a process of this machine that a signal has stopped."""
    match = re.fullmatch(r"process (\d+) on (.+)", holder)
    if match is None or match[2] != socket.gethostname():
        return False
    try:
        status = Path(f"/proc/{match[1]}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] == "T"


def kept_step(workdir: Any) -> int:
    """The newest step whose checkpoint is complete; 0: none, or they cannot be read.

    Only the trainer checks its bytes.
    """
    try:
        folders = (workdir / "checkpoints").iterdir()
        folders = [folder for folder in folders if re.fullmatch(r"\d{1,18}", folder.name)]
        for folder in sorted(folders, key=lambda folder: int(folder.name), reverse=True):
            # The format of moe_jax/checkpoint/manifest.py, which would import JAX.
            if all((folder / name).exists() for name in ("manifest.json", "commit_success.txt")):
                return int(folder.name)
    except Exception:  # each object store's client raises its own errors
        return 0
    return 0


def _folder(workdir: str) -> Any:
    """Make a path; one in an object store needs etils, as in the trainer."""
    if "://" not in workdir:
        return Path(os.path.expanduser(workdir))  # as the trainer does
    from etils import epath

    return epath.Path(workdir)


def _handed_on(code: int) -> int:
    """The exit code in a shell's convention: 128 plus the signal."""
    return code if code >= 0 else 128 - code


def _say(line: str) -> None:
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    print_line(f"{now} {line}")


if __name__ == "__main__":
    run_main(main)
