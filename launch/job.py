"""The job that a launcher starts, and the exit codes after which it is started again."""

import dataclasses
import re
from collections.abc import Sequence

from launch.shell import LaunchError

# Exit codes of the trainer after which the same command resumes the run: 42 preempted (checkpoint
# saved), the watchdog fired, or a peer was lost; 134 (SIGABRT) and 137 (SIGKILL) lost a peer; 143
# terminated before a checkpoint.
AGAIN = (42, 134, 137, 143)


@dataclasses.dataclass(frozen=True)
class Job:
    """One training run."""

    name: str  # stable, safe as a file name and as a cluster's job name: [a-z0-9-]+
    arguments: tuple[str, ...]  # of `python -m moe_jax train`

    def __post_init__(self):
        if not re.fullmatch(r"[a-z0-9-]+", self.name):
            raise LaunchError(
                f"--name={self.name} cannot name a job: use lower-case letters, digits and '-'."
            )


def supervised(python: str, arguments: Sequence[str], max_stuck: int) -> list[str]:
    """The command of one process of a run: the trainer under launch/supervise.py.

    It must start in a checkout, where `launch` can be imported.
    """
    supervisor = [python, "-m", "launch.supervise", f"--max_stuck={max_stuck}", "--"]
    return [*supervisor, python, "-m", "moe_jax", "train", *arguments]
