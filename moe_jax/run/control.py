"""When a run saves and when it ends, agreed by all processes."""

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
    """Why a run ends."""

    NO = 0
    END = 1  # the last step
    PREEMPTED = 2  # SIGTERM
    ASKED = 3  # the file WORKDIR/STOP
    DIVERGED = 4  # more refused steps in a row than train.max_skipped
    DIFFER = 5  # devices hold unequal copies of the state


class Control:
    """Decides after every step.

    Clocks and file systems differ between processes, so what depends on them is read by process 0
    and told to the others every `log_every` steps; a single process looks after every step.
    """

    def __init__(self, config: Config, workdir: Folder, last: int):
        self._config, self._last = config, last
        self._stop_file = workdir / STOP_FILE
        self._saved_at = time.monotonic()
        self.save_now = False  # after the last `after`

    def after(self, done: int, preemption: Preemption) -> Stop:
        """What to do after `done` steps; sets `save_now`."""
        save = self._config.checkpoint
        asked = due = False
        if jax.process_count() == 1:
            asked, due = self._look()
        elif done % self._config.train.log_every == 0:
            asked, due = multihost_utils.broadcast_one_to_all(np.array(self._look())).tolist()
        self.save_now = bool(due or (save.every_steps and done % save.every_steps == 0))
        preempted = preemption.reached(done)
        stop = Stop.NO
        if done >= self._last:
            stop = Stop.END
        elif preempted:
            stop = Stop.PREEMPTED
        elif asked:
            stop = Stop.ASKED
        if self.save_now or stop is not Stop.NO:
            self._saved_at = time.monotonic()
        if asked and jax.process_index() == 0:
            with contextlib.suppress(OSError):  # the step is not saved yet: nothing may fail here
                self._stop_file.unlink(missing_ok=True)  # heard: the next run goes on
        return stop

    def _look(self) -> tuple[bool, bool]:
        """(the STOP file is there, the minutes between checkpoints are over)."""
        minutes = self._config.checkpoint.every_minutes
        due = minutes > 0 and time.monotonic() - self._saved_at >= 60 * minutes
        asked = self._stop_file.exists() and not self._stop_file.is_dir()
        return asked, due
