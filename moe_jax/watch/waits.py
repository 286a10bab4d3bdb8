"""Says what the run waits for, with seconds, while it waits."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

TICK = 1.0  # seconds between two looks


class Waits:
    """`with waits("compiling the train step"):` around what takes long; a context manager itself.

    A thread looks once a second, so that a wait that is over sooner costs nothing.

    Args:
      tell: called with what is waited for and since how many seconds; with "" and 0 once it is
        there.
      tick: seconds between two looks.
    """

    def __init__(self, tell: Callable[[str, float], None], tick: float = TICK):
        self._show, self._tick = tell, tick
        self._wait: tuple[str, float] | None = None  # what, and since when
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="waits", daemon=True)

    def __enter__(self) -> "Waits":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """The body is a wait for `what`; one inside another hides the outer one meanwhile."""
        outer, self._wait = self._wait, (what, time.monotonic())
        try:
            yield
        finally:
            self._wait = outer

    def _tell(self) -> None:
        shown = False
        while not self._over.wait(self._tick):
            if self._wait is not None:
                what, since = self._wait
                self._show(what, time.monotonic() - since)
                shown = True
            elif shown:
                self._show("", 0.0)
                shown = False
