"""Appends whole records to files, on a disk that may be full for some time."""

import collections
import contextlib
import errno
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.files.links import break_hard_link
from moe_jax.files.write_errors import reason

KEPT = 1000  # records held in memory while the disk fails; each is a few KiB


class GrowingFile:
    """Appends records to a local file; a failing disk never stops the caller.

    A record that cannot be written waits in memory and is written before the next one.

    Args:
      path: the file, created if it is missing.
      say: receives one line when writing begins to fail and one when it works again.
      keep: records that may wait; when more do, the oldest is lost.

    Raises:
      OSError: the file cannot be opened.
    """

    def __init__(self, path: pathlib.Path, say: Callable[[str], None], keep: int = KEPT):
        self._path, self._say = path, say
        self._waiting: collections.deque[bytes] = collections.deque(maxlen=keep)
        self._failing, self._lost = False, 0
        break_hard_link(path)
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
        """Overwrite the last record with `record` in one write, or append it if that is impossible.

        A shorter record is appended: overwriting would leave the end of the longer one.
        """
        if self._waiting or not self._last or len(record) < len(self._last):
            self.append(record)
            return
        start = self._size - len(self._last)
        try:
            # A second file object, because one opened for appending writes only at the end.
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
        """Bytes of the record that `replace_last` would overwrite; 0: it would append."""
        return len(self._last)

    def ends_with(self, end: bytes) -> bool:
        """True if the file is empty or its last bytes are `end`; raises OSError."""
        if not self._size:
            return True
        self._file.seek(-min(len(end), self._size), os.SEEK_END)
        return self._file.read(len(end)) == end

    def close(self) -> None:
        """Write the waiting records, if the disk now allows it, and close the file."""
        if self._waiting:
            self._write_waiting()
        if self._waiting:
            self._say(f"{self._path}: {len(self._waiting) + self._lost} records are lost.")
        with contextlib.suppress(OSError):  # a network disk may report a failed write only here
            self._file.close()

    def _write_waiting(self) -> None:
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if not self._failing:
                self._say(
                    f"{self._path} cannot be written ({reason(error)}): make room. The run "
                    f"continues and holds up to {self._waiting.maxlen} records in memory."
                )
            self._failing = True
            return
        if self._failing:
            lost = f", without {self._lost} records" if self._lost else ""
            self._say(f"{self._path} is written again{lost}.")
        self._failing, self._lost = False, 0

    def _write(self, record: bytes) -> None:
        if self._torn:  # a full disk may have written the first part of a record
            self._file.truncate(self._size)
        self._torn = True
        if self._file.write(record) != len(record):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size, self._torn, self._last = self._size + len(record), False, record


class JsonLinesWriter:
    """Appends rows to a JSON-lines file; arguments and errors are those of `GrowingFile`."""

    def __init__(self, path: pathlib.Path, say: Callable[[str], None], keep: int = KEPT):
        self._file = GrowingFile(path, say, keep)
        if not self._file.ends_with(b"\n"):
            self._file.append(b"\n")

    def append(self, row: Mapping[str, Any]) -> None:
        """Write `row`, or keep it until it can be written."""
        self._file.append(_line(row))

    def replace_last(self, row: Mapping[str, Any]) -> None:
        """Replace the last row by `row`, which supersedes it, or append `row`."""
        self._file.replace_last(_line(row, self._file.last_size))

    def close(self) -> None:
        """Write the waiting rows, if the disk now allows it, and close the file."""
        self._file.close()


def _line(row: Mapping[str, Any], width: int = 0) -> bytes:
    """`row` as a JSON line, padded with spaces to at least `width` bytes."""
    return json.dumps(row, allow_nan=False).encode().ljust(width - 1) + b"\n"
