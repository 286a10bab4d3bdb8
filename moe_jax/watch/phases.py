"""What the main thread is about to do: said in one place, heard by whoever limits or counts it."""

import contextlib
from collections.abc import Iterator
from typing import Any

from moe_jax.watch.timekeeper import Timekeeper
from moe_jax.watch.waits import Waits
from moe_jax.watch.watchdog import Watchdog


class Phases:
    """`with phases("step"):` around everything that the main thread may wait for.

    The names are those of `WatchdogConfig`; phases do not nest.

    Args:
      watchdog: limits a phase.
      timekeeper: counts its seconds.
      waits: says what it is, where it takes long.
    """

    def __init__(self, watchdog: Watchdog, timekeeper: Timekeeper, waits: Waits):
        self._watchdog, self._timekeeper, self._waits = watchdog, timekeeper, waits

    @contextlib.contextmanager
    def __call__(self, phase: str, what: str = "") -> Iterator[None]:
        """The body is `phase`, shown to a person as `what`, such as "saving"; empty: not shown."""
        shown = self._waits(what) if what else contextlib.nullcontext()
        with self._watchdog(phase), self._timekeeper(phase), shown:
            yield

    def resumed(self, step: int) -> None:
        """The state is there, training goes on after `step`: at the start, or back from later."""
        self._timekeeper.resumed(step)

    def started(self, step: int, outputs: Any) -> None:
        """`step` was handed to the devices, which are at work until its `outputs` are there."""
        self._timekeeper.started(step, outputs)
