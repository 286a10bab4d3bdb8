"""How a command ends: its exit code, one sentence for a user's mistake, a traceback for a bug."""

import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from absl import logging as absl_logging

from moe_jax.cli import streams
from moe_jax.errors import UserError
from moe_jax.parallel.distributed import AGAIN, FIX, INTERRUPTED, exit_code


def run(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command's `main(argv)` and exits: its result (None: 0), or 1 after an exception.

    Without `argv` it gets the process's own arguments.

    A UserError is printed as its one sentence, any other exception with its traceback.  42 where
    an exception says that another process is gone.  1 or 141 where standard output is lost
    (streams.py).  Several processes end together: one that is lost before that takes the others
    with it, and all of them are run again.
    """
    failed, together = True, False
    streams.guard()
    _quiet_libraries()
    try:
        argv = sys.argv if argv is None else argv
        streams.check_names(argv)
        code = main(argv) or 0
        streams.finish()
        together = jax.distributed.is_initialized()
        jax.distributed.shutdown()  # waits for the others; alone it does nothing
        failed = False
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        code = FIX
    except streams.OutputLostError as lost:
        code = lost.tell()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        code = INTERRUPTED
    except Exception as error:
        traceback.print_exc()
        code = exit_code(error)
        if code == AGAIN:
            print(f"Another process of this run is gone: exit code {code}.", file=sys.stderr)
    streams.abandon()
    waits = any(not t.daemon for t in threading.enumerate() if t is not threading.main_thread())
    if together or (failed and (waits or jax.distributed.is_initialized())):
        # Where all have met at the end, one that is killed while Python takes itself apart would be
        # run again, and wait in vain for the others.  After a failure an orderly exit waits for the
        # other processes, and they wait for this one: for minutes.  So do threads of Orbax for a
        # save that could not begin.
        os._exit(code)
    sys.exit(code)


def _quiet_libraries() -> None:
    """Let this process print our sentence instead of tracebacks of what a library's thread raised.

    Orbax logs what its threads raise, also in the middle of a training step.  And it closes its
    event loop at the first leaf that cannot be read or written: what TensorStore then answers of
    the others raises in threads where Python can only print it, and asyncio logs the errors of
    those that nothing waits for any more.  Nothing is put back: those
    threads may outlive `main`, and the process ends with this command.
    """
    unraisable = sys.unraisablehook

    def not_orbax(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    def waited_for(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not ("exception was never retrieved" in text or "Task was destroyed" in text)

    def hook(args: Any) -> None:
        if str(args.exc_value) != "Event loop is closed":
            unraisable(args)

    absl_logging.get_absl_logger().addFilter(not_orbax)
    logging.getLogger("asyncio").addFilter(waited_for)
    sys.unraisablehook = hook
    threading.excepthook = _thread_failed


def _thread_failed(args: threading.ExceptHookArgs) -> None:
    """A full disk in a library's thread, such as TensorBoard's, is one line; the run says more."""
    if isinstance(args.exc_value, OSError):
        print(
            f"{args.thread.name if args.thread else 'A thread'}: {args.exc_value}", file=sys.stderr
        )
    else:
        threading.__excepthook__(args)
