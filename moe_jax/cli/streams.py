"""Standard output and error that may be closed, full, without a reader, or unable to hold a letter.

A command whose output is lost ends with one sentence on standard error and exit code 1; with none
and 141, as after SIGPIPE, where only the reader went away (`| head`).  A training run goes on: what
it is for stands in its workdir.  Characters that a stream's encoding lacks are printed as escapes.
"""

import contextlib
import errno
import io
import os
import select
import signal
import sys
from collections.abc import Sequence
from typing import Any

from moe_jax.errors import UserError

READER_GONE = 128 + signal.SIGPIPE  # exit code of a program that a broken pipe has ended
STDOUT, STDERR = 1, 2  # file descriptors


class OutputLostError(Exception):
    """Standard output takes no more; raised once, by what prints or flushes."""

    def __init__(self, error: OSError):
        super().__init__(str(error))
        self._error = error

    def tell(self) -> int:
        """Says so on standard error if that is news; returns the exit code."""
        if self._error.errno == errno.EPIPE:
            return READER_GONE
        why = self._error.strerror or self._error
        print(f"Error: standard output cannot be written ({why}).", file=sys.stderr)
        return 1


class _Stream(io.FileIO):
    """The lowest layer of a stream: whatever is printed through any layer above ends here.

    Args:
      descriptor: STDOUT or STDERR; it is never closed.
      open_before: False where the process was started without it.

    Attributes:
      lost: why it takes no more; None: it does.
      needed: whether `OutputLostError` is raised then; False: what is printed vanishes.
      farewell: a line for standard error once it is lost and not needed; empty: none.
    """

    def __init__(self, descriptor: int, open_before: bool):
        super().__init__(descriptor, "w", closefd=False)
        closed = OSError(errno.EBADF, "it is closed")
        self.lost: OSError | None = None if open_before else closed
        self.needed = descriptor == STDOUT
        self.farewell = ""

    def write(self, data: Any, /) -> int:
        """Writes all of `data`, which may be a pipe's worth more than fits at once."""
        left = memoryview(data).cast("B")
        size = left.nbytes
        while self.lost is None and left:
            try:
                written = super().write(left)
                if written is None:  # another program has made it non-blocking
                    select.select([], [self.fileno()], [])
                left = left[written or 0 :]
            except OSError as error:
                self.lost = error
        if left:
            self._give_up()
        return size

    def _give_up(self) -> None:
        assert self.lost is not None
        needed, farewell = self.needed, self.farewell
        self.needed, self.farewell = False, ""
        if needed:
            raise OutputLostError(self.lost)
        if farewell:
            print(farewell.format(why=self.lost.strerror or self.lost), file=sys.stderr)


def guard() -> None:
    """Puts guarded streams in the place of this process's own; call it before anything is opened.

    A stream that something else stands in for, such as a test's capture, is left alone.
    """
    # A file that is opened while 1 is free would be 1: what C++ libraries print would go into it.
    were_open = []
    for descriptor in (0, STDOUT, STDERR):
        try:
            os.fstat(descriptor)
            were_open.append(True)
        except OSError:
            taken = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(taken, True)
            were_open.append(False)
    sys.stdout = _guarded(sys.stdout, STDOUT, were_open[STDOUT])
    sys.stderr = _guarded(sys.stderr, STDERR, were_open[STDERR])


def _guarded(stream: Any, descriptor: int, open_before: bool) -> Any:
    if stream is not None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
        if not _is_own(stream, descriptor):
            return stream
    raw = _Stream(descriptor, open_before)
    unbuffered = bool(getattr(stream, "write_through", False))
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),  # pyright: ignore[reportArgumentType]
        encoding=getattr(stream, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=descriptor == STDERR or raw.isatty(),
        write_through=unbuffered,
    )


def _is_own(stream: Any, descriptor: int) -> bool:
    """Whether Python made it for this descriptor, and nothing has guarded it yet."""
    try:
        return stream.fileno() == descriptor and not isinstance(_raw(stream), _Stream)
    except (OSError, ValueError, AttributeError):
        return False


def _raw(stream: Any) -> Any:
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def go_on_without_output() -> None:
    """From here on losing standard output is one line on standard error and ends nothing."""
    raw = _raw(sys.stdout)
    if isinstance(raw, _Stream):
        raw.needed = False
        raw.farewell = "Standard output is lost ({why}): the run goes on, see its metrics.jsonl."


def finish() -> None:
    """Prints what is held back, when a command has come to its end.

    Raises:
      OutputLostError: something that the command has printed is lost.
    """
    sys.stdout.flush()
    raw = _raw(sys.stdout)
    if isinstance(raw, _Stream) and raw.lost is not None and raw.needed:
        raw._give_up()


def abandon() -> None:
    """The process is about to end for another reason: what is held back may be lost."""
    raw = _raw(sys.stdout)
    if isinstance(raw, _Stream):
        raw.needed, raw.farewell = False, ""
    sys.stdout.flush()
    sys.stderr.flush()


def check_names(arguments: Sequence[str]) -> None:
    """Raises UserError for arguments that cannot be handed to libraries as they were typed.

    Python reads file names in the locale's encoding, libraries in UTF-8.  LANG=C is no obstacle:
    Python then takes UTF-8.
    """
    encoding, folder = sys.getfilesystemencoding(), ""
    with contextlib.suppress(OSError):  # it may be removed
        folder = os.getcwd()
    for text in (*arguments, folder):
        if encoding != "utf-8" and not text.isascii():
            raise UserError(
                f"{text!r} holds more than ASCII and the locale's encoding is {encoding}: set "
                f"PYTHONUTF8=1."
            )
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError(f"{text!r} is not valid UTF-8: rename it.")
