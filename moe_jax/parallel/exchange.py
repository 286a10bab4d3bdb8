"""Exchanges text between the processes of a run before they share an array.

The text goes through the key-value store of JAX's coordination service, not through a collective:
nothing is compiled and no device is touched.  Processes that would run different programs can
therefore still report it.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import jax

# JAX has no public name for the service's key-value store; Orbax takes it from here as well.
from jax._src.distributed import global_state

from moe_jax.errors import UserError

LOOK_INTERVAL = 0.05  # seconds between two reads of the other processes' text
CLOSE_TIMEOUT = 10.0  # seconds that a failing process waits for the others to read its error
TELL_INTERVAL = 1.0  # seconds between two signs of progress
_FAILED, _PROGRESS = "failed", "progress"


def gather(name: str, text: str, on_progress: Callable[[], None] = lambda: None) -> list[str]:
    """Publish `text` under `name` and return what every process published there.

    This waits for the slowest process without a limit of its own: `watchdog.start` limits it if a
    watchdog runs, and JAX ends this process (134) if another sends no heartbeat.

    Args:
      name: a key that this process uses in only one call.
      text: what this process publishes.
      on_progress: called whenever a process that this one waits for has made progress (`relayed`).

    Returns:
      One text per process, in the order of their indices.

    Raises:
      UserError: another process has reported an error (`telling`).
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
            on_progress()
        time.sleep(LOOK_INTERVAL)


def relayed(on_progress: Callable[[], None]) -> Callable[[], None]:
    """A function that calls `on_progress` and signals it to the processes waiting in `gather`."""
    due = 0.0

    def told() -> None:
        nonlocal due
        on_progress()
        if jax.distributed.is_initialized() and time.monotonic() >= due:
            _say(_PROGRESS, str(time.monotonic()))
            due = time.monotonic() + TELL_INTERVAL

    return told


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Report a UserError of the body to the other processes, which raise it in `gather`."""
    try:
        yield
    except UserError as error:
        if jax.distributed.is_initialized():
            _say(_FAILED, str(error))
            leave()
        raise


def leave() -> None:
    """Disconnect from the coordination service; every failing process calls this before it ends.

    A process that ends without this call makes JAX abort the others (SIGABRT, exit code 134) before
    they print their error.  If one of them never disconnects, this waits CLOSE_TIMEOUT seconds.
    """

    def shut_down() -> None:
        with contextlib.suppress(Exception):  # an earlier error ends this process: report that one
            jax.distributed.shutdown()

    waits = threading.Thread(target=shut_down, daemon=True)
    waits.start()
    waits.join(CLOSE_TIMEOUT)


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
        # `distributed.lost_peer` recognizes this word.
        raise RuntimeError(f"CoordinationServiceError: process 0 is gone ({error})") from error
