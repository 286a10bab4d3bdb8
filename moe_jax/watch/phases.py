"""Labels what the main thread is doing, for the watchdog, the timekeeper and the waits shown.

The watchdog limits the time of a phase, the timekeeper counts it (goodput), and `Waits` shows it.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from moe_jax.watch.timekeeper import Timekeeper
from moe_jax.watch.waits import Waits
from moe_jax.watch.watchdog import Watchdog


class Phases:
    """`with phases("step"):` around everything that may block the main thread.

    The names are those of `WatchdogConfig`; phases do not nest.

    Args:
      watchdog: limits the time of a phase.
      timekeeper: counts the seconds of a phase.
      waits: shows a long phase to the user.
    """

    def __init__(self, watchdog: Watchdog, timekeeper: Timekeeper, waits: Waits):
        self._watchdog, self._timekeeper, self._waits = watchdog, timekeeper, waits

    @contextlib.contextmanager
    def __call__(self, phase: str, what: str = "") -> Iterator[None]:
        """Label the body as `phase`, shown as `what`, such as "saving"; "": not shown."""
        shown = self._waits(what) if what else contextlib.nullcontext()
        with self._watchdog(phase), self._timekeeper(phase), shown:
            yield

    def resumed(self, step: int) -> None:
        """Report that the state is ready and training continues after `step` (start or rewind)."""
        self._timekeeper.resumed(step)

    def started(self, step: int, outputs: Any) -> None:
        """Report that `step` was launched; the devices work on it until `outputs` are ready."""
        self._timekeeper.started(step, outputs)
