"""What the processes of a run tell each other before they share an array.

Texts, through the coordination service that JAX has started: no collective, so nothing is compiled
and no device is touched.  Processes that would run different programs can still say so.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import jax

# JAX has no public name for the service's key-value store; Orbax takes it from here as well.
from jax._src.distributed import global_state

from moe_jax.errors import UserError

LOOK = 0.05  # seconds between two looks at what the others have said
LEAVE = 10.0  # seconds that a process which cannot go on waits for the others to hear of it
TELL = 1.0  # seconds between two signs of progress
_FAILED, _PROGRESS = "failed", "progress"


def gather(name: str, text: str, alive: Callable[[], None] = lambda: None) -> list[str]:
    """What each process says under a name.

    It waits for the slowest of them, for as long as that lives: `watchdog.start` bounds this where
    a watchdog runs, and JAX ends the process (134) where another gives no sign of life.

    Args:
      name: a word of its own for each call in the life of a process.
      text: what this process says.
      alive: called whenever a process that this one waits for has got on (`relayed`).

    Returns:
      One text a process, in their order.

    Raises:
      UserError: another process has said that it cannot go on (`telling`).
    """
    if not jax.distributed.is_initialized():
        return [text]
    _say(name, text)
    progress = _said(_PROGRESS)
    while True:
        said = _said(name)
        if len(said) == global_state.num_processes:
            return [said[index] for index in sorted(said)]
        failed = _said(_FAILED)
        if failed:
            leave()
            index = min(failed)
            raise UserError(f"Process {index} of this run cannot go on: {failed[index]}")
        if progress != (progress := _said(_PROGRESS)):
            alive()
        time.sleep(LOOK)


def relayed(alive: Callable[[], None]) -> Callable[[], None]:
    """`alive`, which from now on those hear of as well that wait for this process in `gather`."""
    due = 0.0

    def told() -> None:
        nonlocal due
        alive()
        if jax.distributed.is_initialized() and time.monotonic() >= due:
            _say(_PROGRESS, str(time.monotonic()))
            due = time.monotonic() + TELL

    return told


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """A UserError in the body is told to the others, which end with it at their next `gather`."""
    try:
        yield
    except UserError as error:
        if jax.distributed.is_initialized():
            _say(_FAILED, str(error))
            leave()
        raise


def leave() -> None:
    """Ends the talk with the other processes in order, which all do, before this one ends.

    Who leaves without it takes the others down (134) before they have said why they end.  Where
    one of them does not come, this waits no longer than LEAVE.
    """

    def shut_down() -> None:
        with contextlib.suppress(Exception):  # the error that ends this process is the one to tell
            jax.distributed.shutdown()

    waits = threading.Thread(target=shut_down, daemon=True)
    waits.start()
    waits.join(LEAVE)


def _say(name: str, text: str) -> None:
    with _service() as client:
        key = f"moe_jax/{name}/{global_state.process_id}"
        client.key_value_set(key, text, allow_overwrite=name == _PROGRESS)


def _said(name: str) -> Mapping[int, str]:
    with _service() as client:
        found = client.key_value_dir_get(f"moe_jax/{name}/")
    return {int(key.rpartition("/")[2]): text for key, text in found}


@contextlib.contextmanager
def _service() -> Iterator:
    try:
        yield global_state.client
    except jax.errors.JaxRuntimeError as error:
        # As `distributed.lost_peer` knows what JAX says of it elsewhere.
        raise RuntimeError(f"CoordinationServiceError: process 0 is gone ({error})") from error
