"""Ends a run that hangs: a limit for each thing it waits for, stacks of all threads, exit code 42.

A collective waits for ever for a host that has gone to sleep, and so does a read from a file system
that does not answer.  The main thread says what it is about to do; a thread beside it counts.
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

TICK = 1.0  # seconds between two looks
BARK = 10.0  # seconds for saying where each thread stands
# The lead process holds JAX's coordination service: where it leaves first, all others are aborted
# (134) before they have said where they stand.
LEAD_GRACE = 5.0


class Watchdog:
    """Watches the thread that it is used in, one phase at a time; a context manager.

    Only time in which this process could run counts: one that is stopped and continued, as by
    ctrl-Z, has not hung.

    Attributes:
      folder: gets the stacks, too.
      grace: seconds on top of every limit.
    """

    def __init__(
        self,
        limits: WatchdogConfig,
        folder: Path | None = None,
        end: Callable[[int], None] = os._exit,
        tick: float = TICK,
    ):
        """`folder` gets the stacks beside standard error; `end` is what hangs cannot stop."""
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
        """While the body runs, `watchdog.<phase>` is the limit; phases do not nest."""
        self._seconds, self._spent = 0.0, "taken"
        self._phase = phase
        try:
            yield
        finally:
            self._phase = ""

    def alive(self) -> None:
        """The phase has got on: its limit counts from here anew."""
        self._seconds, self._spent = 0.0, "not got on for"

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
        # Whoever reads standard error may have stopped, and the disk may hang.
        last_word = threading.Timer(BARK, self._end, [AGAIN])
        last_word.daemon = True
        last_word.start()
        where = self.folder / f"stacks-{os.getpid()}.txt" if self.folder else None
        print(
            f"Error: {phase} has {self._spent} more than {limit:g} s (watchdog.{phase}), so this "
            f"process ends with exit code {AGAIN}: run the same command again.  Where each thread "
            f"stands{f', also in {where}' if where else ''}:",
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
