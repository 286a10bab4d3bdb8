"""Ends a command: its exit code, one sentence for a user's mistake, a traceback for a bug."""

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
    """Run a command's `main(argv)` and exit with its result (None: 0), or 1 after an exception.

    A UserError is printed as its one sentence, any other exception with its traceback.  The exit
    code is 42 if the exception means that a peer process is gone, and 1 or 141 if standard output
    is lost (streams.py).  Several processes end together: if one is lost before the shutdown
    barrier, the others fail too, and all of them are restarted.

    Args:
      main: the command; it takes the program's name and its arguments.
      argv: None: the arguments of this process.
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
        jax.distributed.shutdown()  # a barrier over the processes; does nothing with one process
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
        # After the shutdown barrier: a process killed during interpreter shutdown would be
        # restarted and wait for peers that are gone, so exit at once.  After a failure: a normal
        # exit waits minutes for the other processes, which wait for this one, and for Orbax's
        # threads, which wait for a save that could not begin.
        os._exit(code)
    sys.exit(code)


def _quiet_libraries() -> None:
    """Suppress the tracebacks of library threads, because the command prints its own sentence.

    Orbax logs the exceptions of its threads, also in the middle of a training step.  It closes its
    event loop at the first leaf that cannot be read or written.  TensorStore's results for the
    other leaves then raise in threads where Python can only print the exception, and asyncio logs
    the errors of tasks that are no longer awaited.  The hooks are not restored: those threads may
    outlive `main`, and the process ends with this command.
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
    """Print an OSError of a library's thread (TensorBoard, full disk) as one line."""
    if isinstance(args.exc_value, OSError):
        print(
            f"{args.thread.name if args.thread else 'A thread'}: {args.exc_value}", file=sys.stderr
        )
    else:
        threading.__excepthook__(args)
