"""Two supervised processes of one run, and what an onlooker sees of where the run stands."""

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
RESTART = re.compile(r"\S+ restart \d+: (.*), goes on from \d+, (-?\d+) steps lost")
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
    """Starts both processes; a context manager that leaves none behind.  Linux only.

    Args:
      folder: of the run, the store and the logs.
      arguments: of `python -m moe_jax train`, beside the workdir and what makes two processes.
      eval_every: steps between two evaluations, which are seen by nothing else.
      env: of the processes.
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
        self._since = time.time()  # when the younger of the two was first seen
        self._last = (START, time.monotonic())
        self.step = 0  # the last that was logged
        self.heard = time.monotonic()  # when the lead last said something
        self.seconds: dict[str, float] = {}  # how long a phase that came to its end last took

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
        """Of the two trainers; None where none runs just now."""
        found = [_child(supervisor.pid) for supervisor in self._supervisors]
        if any(new != old for new, old in zip(found, self._pids, strict=True) if new is not None):
            self._since = time.time()
        self._pids = found
        return found

    def codes(self) -> list[int | None]:
        """Exit codes of the supervisors; None where one still runs."""
        return [supervisor.poll() for supervisor in self._supervisors]

    def phase(self) -> str:
        """One of PHASES; the other process may be a moment ahead or behind."""
        restarted = self._read()
        now = self._begun
        if now in (START, STORE):
            now = STORE if self._building() else now
        elif now in (STEPS, EVALUATION, END) and self._saving():
            now = SAVE
        before, at = self._last
        if now == START and before != START and not restarted:
            now = RESTORE  # the other process has built the store, and the lead is about to say so
        if restarted:
            self._last = (now, time.monotonic())
        elif now != before:
            self.seconds[before] = time.monotonic() - at
            self._last = (now, time.monotonic())
        return now

    def built(self) -> bool:
        """Whether the store is there."""
        return any(self._store.glob("*/manifest.json"))

    def said(self, index: int) -> list[re.Match[str]]:
        """The lines in which a supervisor told of a restart."""
        lines = (self._folder / f"process-{index}.out").read_text().splitlines()
        return [match for match in map(RESTART.match, lines) if match]

    def tail(self) -> str:
        """The ends of all logs, for a person."""
        logs = sorted(self._folder.glob("process-*.*"))
        return "\n".join(f"--- {log}\n{log.read_text()[-1500:]}" for log in logs)

    def _read(self) -> bool:
        """Follows the lead's output; whether it was restarted meanwhile."""
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
        """Whether one of these processes has asked for the store, which is not there yet."""
        return not self.built() and self._younger(self._store.glob("*.lock"))

    def _saving(self) -> bool:
        """Whether a save of these processes, and not of killed ones, is on disk unfinished."""
        return self._younger(self._checkpoints.glob("*.orbax-checkpoint-tmp*"))

    def _younger(self, paths: Iterable[Path]) -> bool:
        for path in paths:
            try:
                if path.stat().st_mtime > self._since:
                    return True
            except FileNotFoundError:  # just finished
                pass
        return False


def after_line(line: str, phase: str, step: int, eval_every: int) -> tuple[str, int]:
    """(phase, last logged step) once the lead has said `line`, from those before it."""
    if logged := _STEP.match(line):
        step, total = int(logged[1]), int(logged[2])
        if step == total:
            return END, step
        return (EVALUATION if logged[3] == "loss" and step % eval_every == 0 else STEPS), step
    return next((begun for sign, begun in _SIGNS if sign.match(line)), phase), step


# The waits between restarts are no part of what is tried, and kills that come in a row before there
# is anything to keep must not end the run.
_SUPERVISE = (
    *(sys.executable, "-m", "launch.supervise"),
    *("--wait=0.1", "--max_wait=0.5", "--max_stuck=1000000", "--"),
)


def send(pids: Iterable[int], number: int) -> None:
    """A signal to processes, those that are still there."""
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
    """Below Linux's ephemeral ports: an outgoing connection could take one of those between a
    death and a restart, even that of the other process which tries to connect."""
    first = 20_000 + os.getpid() % 10_000  # not that of another soak that starts just now
    for port in range(first, 32_000):
        with socket.socket() as probe:
            try:
                probe.bind(("localhost", port))
            except OSError:
                continue
            return port
    raise OSError(f"no port is free between {first} and 32000")
