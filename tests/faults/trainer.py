"""Trainers as processes, and the comparisons of finished runs that the fault tests share."""

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

# One layer, because it compiles fast.  The router has noise and a bias, so that a test notices a
# lost random key or router state.  Nothing depends on train.steps.
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
ENDS = 240  # seconds that a process may take to end


class Trainer:
    """A process; `lines` are the lines of its stdout and stderr so far."""

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
        """Wait for a line that matches the pattern; fail if the process ends without one."""

        def said() -> bool:
            return any(re.search(pattern, line) for line in self.lines)

        with self._heard:
            self._heard.wait_for(lambda: said() or self._over, timeout=ENDS)
            assert said(), f"no line with {pattern!r}:\n{self.text}"

    def finish(self, seconds: float = ENDS) -> int:
        """Wait for the end, until all output is in `lines`; returns the exit code."""
        code = self.process.wait(seconds)
        self._reader.join()
        return code

    def kill(self) -> None:
        """Kill the process, in whatever state it is."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.finish()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def peers(count: int, devices: int) -> list[list[str]]:
    """The flags of `count` processes by which they find each other, one list per process."""
    own = [f"--devices={devices}", f"--coordinator=localhost:{free_port()}"]
    return [[*own, f"--process_count={count}", f"--process_id={i}"] for i in range(count)]


def checkpoints(workdir: Path) -> Checkpoints:
    return Checkpoints(workdir / "checkpoints")


def numbers(workdir: Path) -> list[list[float]]:
    """The logged numbers of each step, without its speed."""
    return [[row[name] for name in NUMBERS] for row in train_rows(workdir)]


def assert_same_end(workdir: Path, straight: Path, steps: int) -> None:
    """Assert that two runs agree in every number of every step and every bit of the last state."""
    assert numbers(workdir) == numbers(straight)
    found, expected = checkpoints(workdir), checkpoints(straight)
    assert found.verify(steps) is None
    for part in PARTS:
        assert found.digest(steps, part) == expected.digest(steps, part), part
