"""Helpers for runs that launchers start: their flags, their processes, their results."""

import contextlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from small_run import flags

from moe_jax.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parents[1]

# Two processes with one device each; enough steps that a test can disturb the run on its way.
TWO = {
    "model.num_layers": 1,
    "model.moe.every": 1,
    "model.width": 16,
    "mesh.data": 2,
    "model.moe.group_rows": 4,
    "train.steps": 200,
    "train.log_every": 10,
    "checkpoint.every_steps": 50,
    "checkpoint.keep_last": 100,
    "eval.samples": 0,
}


def two_process_flags(workdir: Path, files: str) -> tuple[str, ...]:
    """The trainer's arguments for a run of two processes."""
    return tuple(flags(workdir, files, **TWO))


def digest(workdir: Path) -> str:
    """SHA-256 of the final parameters; asserts that the last step has a good checkpoint."""
    checkpoints, last = Checkpoints(workdir / "checkpoints"), TWO["train.steps"]
    assert checkpoints.steps()[-1] == last
    assert checkpoints.verify(last) is None
    return checkpoints.digest(last)


def trainer(workdir: Path, variable: str) -> int:
    """The process id of the run's trainer that has `variable` (NAME=VALUE) in its environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile
            words = (process / "cmdline").read_text().split("\0")
            variables = (process / "environ").read_text().split("\0")
            trains = words[1:3] == ["-m", "moe_jax", "train"] and f"--workdir={workdir}" in words
            if trains and variable in variables:
                found.append(int(process.name))
    [pid] = found
    return pid


@contextlib.contextmanager
def following(path: Path) -> Iterator["Follower"]:
    """Follow the lines of a file that another process writes; it need not exist yet."""
    process = subprocess.Popen(
        ["tail", "-n", "+1", "--sleep-interval=0.1", "-F", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield Follower(process)
    finally:
        process.kill()
        process.communicate()


class Follower:
    """Reads lines until one of them matches a pattern."""

    def __init__(self, process: subprocess.Popen):
        self._process = process
        self.lines: list[str] = []

    def until(self, pattern: str, unless: str = r"exit code [13]$") -> str:
        """The next line that matches `pattern`; fails at a line that matches `unless`."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line)
            if re.search(pattern, line):
                return line
            if re.search(unless, line):
                break
        raise AssertionError(f"no line with {pattern!r}:\n{''.join(self.lines)}")
