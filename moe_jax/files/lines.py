"""A file of JSON lines that grows at its end."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from moe_jax.errors import UserError
from moe_jax.files.links import own


class Lines:
    """Appends rows to `path`; raises OSError where it cannot be opened."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        own(path)
        # Unbuffered: a row is one write, so a kill leaves at most one torn line, the last.
        self._file = path.open("ab+", buffering=0)
        if self._file.tell():
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")  # at the end, as all writes to this file

    def append(self, row: Mapping[str, Any]) -> None:
        """Raises UserError where `row` cannot be written."""
        try:
            self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written ({error.strerror or error}): make room, then run "
                f"the same command again."
            ) from None

    def close(self) -> None:
        self._file.close()
