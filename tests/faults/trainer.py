"""Trainers in processes of their own, and what the tests of faults compare afterwards."""

import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from small_run import train_rows

from moe_jax.checkpoint import Checkpoints

# One layer, so that it compiles soon; noise and a bias in the router, so that there is a random
# number and a state of the router to lose.  Nothing depends on the number of steps.
OVERRIDES = {
    "model.num_layers": 1,
    "model.moe.every": 1,
    "model.width": 16,
    "model.moe.router": "sigmoid_bias",
    "model.moe.options.sigmoid_bias.update_rate": 0.01,
    "model.moe.options.sigmoid_bias.jitter": 0.1,
    "model.moe.group_rows": 4,
    "optimizer.schedule": "constant",
    "eval.samples": 0,
    "train.steps": 40,
    "checkpoint.every_steps": 2,
}
NUMBERS = ("step", "loss", "grad_norm", "kept", "dropped", "learning_rate", "tokens")
PARTS = ("params", "optimizer", "router")
ENDS = 240  # seconds after which a process that should have ended is a failure


class Trainer:
    """A process; `lines` is what it has said so far, standard error among it."""

    def __init__(
        self,
        arguments: Sequence[str],
        env: dict[str, str],
        program: Sequence[str] = (sys.executable, "-m", "moe_jax", "train"),
        cwd: Path | None = None,
    ):
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [*program, *arguments],
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._heard, self._over = threading.Condition(), False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._heard:
                self.lines.append(line.rstrip("\n"))
                self._heard.notify_all()
        with self._heard:
            self._over = True
            self._heard.notify_all()

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str) -> None:
        """Returns once a line has said it; fails where the process ends without."""

        def said() -> bool:
            return any(re.search(pattern, line) for line in self.lines)

        with self._heard:
            self._heard.wait_for(lambda: said() or self._over, timeout=ENDS)
            assert said(), f"no line with {pattern!r}:\n{self.text}"

    def finish(self, seconds: float = ENDS) -> int:
        """Its exit code, once it has ended and all it said is in `lines`."""
        code = self.process.wait(seconds)
        self._reader.join()
        return code

    def kill(self) -> None:
        """Whatever state it is in."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.finish()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def peers(count: int, devices: int) -> list[list[str]]:
    """For each of `count` processes the flags with which they find each other."""
    own = [f"--devices={devices}", f"--coordinator=localhost:{free_port()}"]
    return [[*own, f"--process_count={count}", f"--process_id={i}"] for i in range(count)]


def checkpoints(workdir: Path) -> Checkpoints:
    return Checkpoints(workdir / "checkpoints")


def numbers(workdir: Path) -> list[list[float]]:
    """What each step logged, speed aside."""
    return [[row[name] for name in NUMBERS] for row in train_rows(workdir)]


def assert_same_end(workdir: Path, straight: Path, steps: int) -> None:
    """Every number of every step, and every bit of the last state."""
    assert numbers(workdir) == numbers(straight)
    found, expected = checkpoints(workdir), checkpoints(straight)
    assert found.verify(steps) is None
    for part in PARTS:
        assert found.digest(steps, part) == expected.digest(steps, part), part
