"""Decides when a run saves and when it ends; all processes get the same decision."""

import contextlib
import enum
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_jax.config import Config
from moe_jax.files.workdir import Folder
from moe_jax.parallel.distributed import Preemption

STOP_FILE = "STOP"


class Stop(enum.Enum):
    """The reason why a run ends."""

    CONTINUE = 0  # the run continues
    END = 1  # the last step
    PREEMPTED = 2  # SIGTERM
    ASKED = 3  # the file WORKDIR/STOP
    DIVERGED = 4  # more skipped steps in a row than train.max_skipped
    DIFFER = 5  # replicas of the state differ


class Control:
    """Decides after every step whether to save and whether to stop.

    Clocks and file systems differ between processes.  Process 0 therefore reads the clock and
    looks for the STOP file, and broadcasts the result every `log_every` steps.  A single process
    looks after every step.
    """

    def __init__(self, config: Config, workdir: Folder, last: int):
        self._config, self._last = config, last
        self._stop_file = workdir / STOP_FILE
        self._saved_at = time.monotonic()
        self.save_now = False  # set by `after`

    def after(self, done: int, preemption: Preemption) -> Stop:
        """Set `save_now` after `done` steps and return the reason to stop, if there is one."""
        save = self._config.checkpoint
        asked = due = False
        if jax.process_count() == 1:
            asked, due = self._look()
        elif done % self._config.train.log_every == 0:
            asked, due = multihost_utils.broadcast_one_to_all(np.array(self._look())).tolist()
        self.save_now = bool(due or (save.every_steps and done % save.every_steps == 0))
        preempted = preemption.reached(done)
        stop = Stop.CONTINUE
        if done >= self._last:
            stop = Stop.END
        elif preempted:
            stop = Stop.PREEMPTED
        elif asked:
            stop = Stop.ASKED
        if self.save_now or stop is not Stop.CONTINUE:
            self._saved_at = time.monotonic()
        if asked and jax.process_index() == 0:
            with contextlib.suppress(OSError):  # an error here would lose the step, not saved yet
                self._stop_file.unlink(missing_ok=True)  # the next attempt must not stop at it
        return stop

    def _look(self) -> tuple[bool, bool]:
        """Read (the STOP file exists, checkpoint.every_minutes have passed since the last save)."""
        minutes = self._config.checkpoint.every_minutes
        due = minutes > 0 and time.monotonic() - self._saved_at >= 60 * minutes
        asked = self._stop_file.exists() and not self._stop_file.is_dir()
        return asked, due
