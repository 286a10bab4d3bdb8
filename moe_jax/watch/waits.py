"""Shows what the run is waiting for, and for how many seconds."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

TICK_INTERVAL = 1.0  # seconds between two checks


class Waits:
    """`with waits("compiling the train step"):` around a long operation; itself a context manager.

    A thread checks once per second, so a wait that ends sooner costs no time.

    Args:
      tell: called with the current wait and its seconds; with "" and 0 after the wait ended.
      tick: seconds between two checks.
    """

    def __init__(self, tell: Callable[[str, float], None], tick: float = TICK_INTERVAL):
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
        """Label the body as a wait for `what`; an inner wait hides the outer one while it lasts."""
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
