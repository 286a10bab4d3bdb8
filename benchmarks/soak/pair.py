"""Starts two supervised processes of one run, and observes its phase from outside."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
START, STORE, RESTORE, COMPILE = "start", "store build", "restore", "compile"
STEPS, SAVE, EVALUATION, END = "steps", "save", "evaluation", "after the last step"
PHASES = (START, STORE, RESTORE, COMPILE, STEPS, SAVE, EVALUATION, END)
RESTART = re.compile(r"\S+ restart \d+: (.*), resumes from \d+, (-?\d+) steps lost")
HEARTBEAT = 6  # seconds: with the 100 of a config each silent process would cost minutes
_STEP = re.compile(r"step (\d+)/(\d+)  (loss|eval_loss) ")
_SIGNS = (
    (RESTART, START),
    (re.compile("building the store"), STORE),
    (re.compile("routing group: "), RESTORE),  # after the store, before the state
    (re.compile("state ready"), COMPILE),
    (re.compile("(read the compiled|compiled the) train step in"), STEPS),
    (re.compile(r"step (\d+) of \1 is done"), END),
)


class Pair:
    """Starts both processes; a context manager that ends them.  Linux only.

    Args:
      folder: for the run, the store and the logs.
      arguments: of `python -m moe_jax train`, without the workdir and the flags of two processes.
      eval_every: steps between two evaluations, by which this class detects an evaluation.
      env: environment of the processes.
    """

    def __init__(
        self, folder: Path, arguments: Sequence[str], eval_every: int, env: Mapping[str, str]
    ):
        self.workdir = folder / "run"
        self._folder, self._eval_every = folder, eval_every
        self._store, self._checkpoints = folder / "stores", self.workdir / "checkpoints"
        folder.mkdir(parents=True)
        train = [
            *(sys.executable, "-m", "moe_jax", "train", *arguments, f"--workdir={self.workdir}"),
            *(f"--coordinator=localhost:{_free_port()}", "--process_count=2"),
            "--devices=1",
        ]
        self._supervisors: list[subprocess.Popen] = []
        for index in range(2):
            with (
                (folder / f"process-{index}.out").open("w") as out,
                (folder / f"process-{index}.err").open("w") as err,
            ):
                self._supervisors.append(
                    subprocess.Popen(
                        [*_SUPERVISE, *train, f"--process_id={index}"],
                        cwd=ROOT,
                        env=env,
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=err,
                    )
                )
        self._lines = (folder / "process-0.out").open()
        self._begun, self._torn = START, ""
        self._pids: list[int | None] = [None, None]
        self._since = time.time()  # time at which the younger process was first seen
        self._last = (START, time.monotonic())
        self.step = 0  # the last logged step
        self.heard = time.monotonic()  # time of the last output of the lead process
        self.seconds: dict[str, float] = {}  # the last complete duration of each phase

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *_: object) -> None:
        for supervisor, pid in zip(self._supervisors, self.pids(), strict=True):
            if supervisor.poll() is None:
                supervisor.kill()
            supervisor.wait()
            if pid is not None:
                send([pid], signal.SIGKILL)
        self._lines.close()

    def pids(self) -> list[int | None]:
        """The process ids of the two trainers; None: it does not run now."""
        found = [_child(supervisor.pid) for supervisor in self._supervisors]
        if any(new != old for new, old in zip(found, self._pids, strict=True) if new is not None):
            self._since = time.time()
        self._pids = found
        return found

    def codes(self) -> list[int | None]:
        """The exit codes of the supervisors; None: it still runs."""
        return [supervisor.poll() for supervisor in self._supervisors]

    def phase(self) -> str:
        """The phase of the lead process, of PHASES; the other may be slightly ahead or behind."""
        restarted = self._read()
        now = self._begun
        if now in (START, STORE):
            now = STORE if self._building() else now
        elif now in (STEPS, EVALUATION, END) and self._saving():
            now = SAVE
        before, at = self._last
        if now == START and before != START and not restarted:
            now = RESTORE  # the other process has built the store; the lead has not printed it yet
        if restarted:
            self._last = (now, time.monotonic())
        elif now != before:
            self.seconds[before] = time.monotonic() - at
            self._last = (now, time.monotonic())
        return now

    def built(self) -> bool:
        """True if the store exists."""
        return any(self._store.glob("*/manifest.json"))

    def said(self, index: int) -> list[re.Match[str]]:
        """The lines in which a supervisor reported a restart."""
        lines = (self._folder / f"process-{index}.out").read_text().splitlines()
        return [match for match in map(RESTART.match, lines) if match]

    def tail(self) -> str:
        """The last lines of all logs, for the error report."""
        logs = sorted(self._folder.glob("process-*.*"))
        return "\n".join(f"--- {log}\n{log.read_text()[-1500:]}" for log in logs)

    def _read(self) -> bool:
        """Read the new output of the lead process; return True if it was restarted."""
        restarted = False
        while chunk := self._lines.readline():
            self._torn += chunk
            if not chunk.endswith("\n"):
                break
            line, self._torn = self._torn, ""
            self.heard = time.monotonic()
            restarted |= bool(RESTART.match(line))
            self._begun, self.step = after_line(line, self._begun, self.step, self._eval_every)
        return restarted

    def _building(self) -> bool:
        """True if one of these processes is building the store."""
        return not self.built() and self._younger(self._store.glob("*.lock"))

    def _saving(self) -> bool:
        """True if an unfinished save of these processes, not of killed ones, is on disk."""
        return self._younger(self._checkpoints.glob("*.orbax-checkpoint-tmp*"))

    def _younger(self, paths: Iterable[Path]) -> bool:
        for path in paths:
            try:
                if path.stat().st_mtime > self._since:
                    return True
            except FileNotFoundError:  # finished a moment ago
                pass
        return False


def after_line(line: str, phase: str, step: int, eval_every: int) -> tuple[str, int]:
    """Update (phase, last logged step) with an output line of the lead process."""
    if logged := _STEP.match(line):
        step, total = int(logged[1]), int(logged[2])
        if step == total:
            return END, step
        return (EVALUATION if logged[3] == "loss" and step % eval_every == 0 else STEPS), step
    return next((begun for sign, begun in _SIGNS if sign.match(line)), phase), step


# Waits between restarts are not tested here, so they are short.  Several kills before the first
# checkpoint must not end the run, so --max_stuck is large.
_SUPERVISE = (
    *(sys.executable, "-m", "launch.supervise"),
    *("--wait=0.1", "--max_wait=0.5", "--max_stuck=1000000", "--"),
)


def send(pids: Iterable[int], number: int) -> None:
    """Send a signal to the processes that still exist."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _child(pid: int) -> int | None:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(children[0]) if children else None


def _free_port() -> int:
    """Find a free port below Linux's ephemeral ports.

    Between a death and a restart, an outgoing connection could take an ephemeral port, even the
    connection of the other process.
    """
    first = 20_000 + os.getpid() % 10_000  # differs from a soak that starts at the same time
    for port in range(first, 32_000):
        with socket.socket() as probe:
            try:
                probe.bind(("localhost", port))
            except OSError:
                continue
            return port
    raise OSError(f"no port is free between {first} and 32000")
