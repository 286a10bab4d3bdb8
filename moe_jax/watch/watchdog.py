"""Ends a run that hangs: a time limit per phase, stacks of all threads, exit code 42.

A collective waits forever for a host that stopped, and so does a read from an unresponsive file
system.  The main thread labels its current phase; a watchdog thread counts the seconds.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from moe_jax.parallel.distributed import AGAIN
from moe_jax.sections import WatchdogConfig

TICK_INTERVAL = 1.0  # seconds between two checks
REPORT_TIMEOUT = 10.0  # seconds for writing the stacks of all threads
# The lead process hosts JAX's coordination service: if it exits first, all others are aborted (134)
# before they have written their stacks.
LEAD_GRACE = 5.0


class Watchdog:
    """Watches the thread that it is used in, one phase at a time; a context manager.

    Only time in which this process could run counts: a process that is stopped and continued, as by
    ctrl-Z, has not hung.

    Attributes:
      folder: folder for a file with the stacks; None: no file.
      grace: seconds added to every limit.
    """

    def __init__(
        self,
        limits: WatchdogConfig,
        folder: Path | None = None,
        end: Callable[[int], None] = os._exit,
        tick: float = TICK_INTERVAL,
    ):
        """The stacks go to standard error and to `folder`; `end` exits even from a hang."""
        self.folder, self.grace = folder, 0.0
        self._limits, self._end, self._tick = limits, end, tick
        self._phase, self._seconds, self._spent = "", 0.0, ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._count, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Apply the limit `watchdog.<phase>` to the body; phases do not nest."""
        self._seconds, self._spent = 0.0, "taken"
        self._phase = phase
        try:
            yield
        finally:
            self._phase = ""

    def on_progress(self) -> None:
        """Report progress: the limit of the phase counts from now."""
        self._seconds, self._spent = 0.0, "made no progress for"

    def _count(self) -> None:
        last = time.monotonic()
        while not self._over.wait(self._tick):
            now = time.monotonic()
            self._seconds += min(now - last, 2 * self._tick)
            last, phase = now, self._phase
            limit = getattr(self._limits, phase) if phase else 0.0
            if limit and self._seconds > limit + self.grace:
                self._bark(phase, limit)
                return

    def _bark(self, phase: str, limit: float) -> None:
        # Writing may block: the reader of standard error may have stopped, or the disk may hang.
        last_word = threading.Timer(REPORT_TIMEOUT, self._end, [AGAIN])
        last_word.daemon = True
        last_word.start()
        where = self.folder / f"stacks-{os.getpid()}.txt" if self.folder else None
        print(
            f"Error: {phase} has {self._spent} more than {limit:g} s (watchdog.{phase}), so this "
            f"process ends with exit code {AGAIN}: run the same command again.  Stacks of all "
            f"threads{f', also in {where}' if where else ''}:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        if where:
            with contextlib.suppress(OSError):
                where.parent.mkdir(parents=True, exist_ok=True)
                with where.open("w", encoding="utf-8") as file:
                    faulthandler.dump_traceback(file, all_threads=True)
        last_word.cancel()
        self._end(AGAIN)
