"""Files that grow at their end by whole records, on a disk that may be full for a while."""

import collections
import contextlib
import errno
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.files.links import own
from moe_jax.files.write_errors import reason

KEPT = 1000  # records that wait for the disk; each is a few KiB


class GrowingFile:
    """Appends records to a local file; a disk that fails never stops the caller.

    A record that cannot be written waits in memory and is written before the next one.

    Args:
      path: made if it is missing.
      say: gets one line when writing begins to fail and one when it works again.
      keep: records that may wait; beyond them the oldest is lost.

    Raises:
      OSError: the file cannot be opened.
    """

    def __init__(self, path: pathlib.Path, say: Callable[[str], None], keep: int = KEPT):
        self._path, self._say = path, say
        self._waiting: collections.deque[bytes] = collections.deque(maxlen=keep)
        self._failing, self._lost = False, 0
        own(path)
        # Unbuffered: a record is one write, so a kill leaves at most one torn record, the last.
        self._file = path.open("ab+", buffering=0)
        self._size, self._torn = self._file.tell(), False
        self._last = b""  # the record at the end of the file, if this process wrote it

    def append(self, record: bytes) -> None:
        """Write `record`, or keep it until it can be written."""
        self._lost += len(self._waiting) == self._waiting.maxlen
        self._waiting.append(record)
        self._write_waiting()

    def replace_last(self, record: bytes) -> None:
        """Write `record` over the last one, in one write; append it where that cannot be done.

        One that is shorter cannot: what it would leave of the last one is no record.
        """
        if self._waiting or not self._last or len(record) < len(self._last):
            self.append(record)
            return
        start = self._size - len(self._last)
        try:
            # Of its own: a file that is open for appending writes at its end alone.
            with self._path.open("rb+", buffering=0) as file:
                file.seek(start)
                if file.write(record) != len(record):  # the disk is full
                    file.seek(start)
                    file.write(self._last)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._size, self._last = start + len(record), record
        except OSError:
            self._torn = True
            self.append(record)

    @property
    def last_size(self) -> int:
        """Bytes of the record that `replace_last` would write over; 0: it would append."""
        return len(self._last)

    def ends_with(self, end: bytes) -> bool:
        """Whether the file is empty or its last bytes are `end`; raises OSError."""
        if not self._size:
            return True
        self._file.seek(-min(len(end), self._size), os.SEEK_END)
        return self._file.read(len(end)) == end

    def close(self) -> None:
        """Write what waits, if the disk allows it now, and close the file."""
        if self._waiting:
            self._write_waiting()
        if self._waiting:
            self._say(f"{self._path}: {len(self._waiting) + self._lost} records are lost.")
        with contextlib.suppress(OSError):  # a network disk reports a failed write this late
            self._file.close()

    def _write_waiting(self) -> None:
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if not self._failing:
                self._say(
                    f"{self._path} cannot be written ({reason(error)}): make room. The run goes "
                    f"on and keeps up to {self._waiting.maxlen} records for it in memory."
                )
            self._failing = True
            return
        if self._failing:
            lost = f", without {self._lost} records" if self._lost else ""
            self._say(f"{self._path} is written again{lost}.")
        self._failing, self._lost = False, 0

    def _write(self, record: bytes) -> None:
        if self._torn:  # a full disk takes the first part of a record
            self._file.truncate(self._size)
        self._torn = True
        if self._file.write(record) != len(record):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size, self._torn, self._last = self._size + len(record), False, record


class Lines:
    """Appends rows to a file of JSON lines; arguments and errors are those of `GrowingFile`."""

    def __init__(self, path: pathlib.Path, say: Callable[[str], None], keep: int = KEPT):
        self._file = GrowingFile(path, say, keep)
        if not self._file.ends_with(b"\n"):
            self._file.append(b"\n")

    def append(self, row: Mapping[str, Any]) -> None:
        """Write `row`, or keep it until it can be written."""
        self._file.append(_line(row))

    def replace_last(self, row: Mapping[str, Any]) -> None:
        """Write `row` over the last one, of which it holds all that counts, or append it."""
        self._file.replace_last(_line(row, self._file.last_size))

    def close(self) -> None:
        """Write what waits, if the disk allows it now, and close the file."""
        self._file.close()


def _line(row: Mapping[str, Any], width: int = 0) -> bytes:
    """`row` as a line of at least `width` bytes, spaces at its end included."""
    return json.dumps(row, allow_nan=False).encode().ljust(width - 1) + b"\n"
