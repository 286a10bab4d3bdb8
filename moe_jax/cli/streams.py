"""Guards standard output and error: closed, disk full, broken pipe, characters it cannot encode.

A command whose output is lost ends with one sentence on standard error and exit code 1, or without
a sentence and with 141, as after SIGPIPE, if only the reader is gone (`| head`).  A training run
continues, because its results are in its workdir.  Characters that a stream's encoding lacks are
printed as escapes.
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

READER_GONE = 128 + signal.SIGPIPE  # exit code of a program ended by a broken pipe
STDOUT, STDERR = 1, 2  # file descriptors


class OutputLostError(Exception):
    """Standard output cannot be written; raised once, by the call that prints or flushes."""

    def __init__(self, error: OSError):
        super().__init__(str(error))
        self._error = error

    def tell(self) -> int:
        """Print the reason on standard error, except for a broken pipe; return the exit code."""
        if self._error.errno == errno.EPIPE:
            return READER_GONE
        why = self._error.strerror or self._error
        print(f"Error: standard output cannot be written ({why}).", file=sys.stderr)
        return 1


class _Stream(io.FileIO):
    """The raw layer of a stream, through which all layers above it write.

    Args:
      descriptor: STDOUT or STDERR; it is never closed.
      open_before: False: the process was started with this descriptor closed.

    Attributes:
      lost: the error after which nothing more is written; None: the stream works.
      needed: True: raise `OutputLostError` when it is lost; False: discard the output.
      farewell: line for standard error when it is lost and not needed; empty: no line.
    """

    def __init__(self, descriptor: int, open_before: bool):
        super().__init__(descriptor, "w", closefd=False)
        closed = OSError(errno.EBADF, "it is closed")
        self.lost: OSError | None = None if open_before else closed
        self.needed = descriptor == STDOUT
        self.farewell = ""

    def write(self, data: Any, /) -> int:
        """Write all of `data`, in parts if a pipe cannot take it at once."""
        left = memoryview(data).cast("B")
        size = left.nbytes
        while self.lost is None and left:
            try:
                written = super().write(left)
                if written is None:  # another program has made the descriptor non-blocking
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
    """Replace sys.stdout and sys.stderr by guarded streams; call it before any file is opened.

    A stream that is already replaced, such as by a test's capture, is left alone.
    """
    # A file opened while descriptor 1 is closed would get descriptor 1 and receive what C++
    # libraries print.
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
    """True if Python made `stream` for this descriptor and it is not guarded yet."""
    try:
        return stream.fileno() == descriptor and not isinstance(_raw(stream), _Stream)
    except (OSError, ValueError, AttributeError):
        return False


def _raw(stream: Any) -> Any:
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def go_on_without_output() -> None:
    """From now on, report the loss of standard output in one line and do not end the process."""
    raw = _raw(sys.stdout)
    if isinstance(raw, _Stream):
        raw.needed = False
        raw.farewell = "Standard output is lost ({why}): the run continues, see its metrics.jsonl."


def finish() -> None:
    """Flush standard output at the end of a command.

    Raises:
      OutputLostError: some output of the command is lost.
    """
    sys.stdout.flush()
    raw = _raw(sys.stdout)
    if isinstance(raw, _Stream) and raw.lost is not None and raw.needed:
        raw._give_up()


def abandon() -> None:
    """Flush both streams before the process ends for another reason; lost output is ignored."""
    raw = _raw(sys.stdout)
    if isinstance(raw, _Stream):
        raw.needed, raw.farewell = False, ""
    sys.stdout.flush()
    sys.stderr.flush()


def check_names(arguments: Sequence[str]) -> None:
    """Raise UserError for arguments that libraries would not read as they were typed.

    Python reads file names in the locale's encoding, libraries in UTF-8.  LANG=C works, because
    Python then uses UTF-8.
    """
    encoding, folder = sys.getfilesystemencoding(), ""
    with contextlib.suppress(OSError):  # the folder may have been removed
        folder = os.getcwd()
    for text in (*arguments, folder):
        if encoding != "utf-8" and not text.isascii():
            raise UserError(
                f"{text!r} is not ASCII, and the locale's encoding is {encoding}: set PYTHONUTF8=1."
            )
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError(f"{text!r} is not valid UTF-8: rename it.")
