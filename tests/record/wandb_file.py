"""Reads the file of an offline run of Weights & Biases: protocol buffers in a log of LevelDB.

Reference: LevelDB, doc/log_format.md; the file has seven bytes more at its beginning.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

_BLOCK, _HEADER = 32 * 1024, 7
_WHOLE, _FIRST, _LAST = 1, 2, 4


def records(path: pathlib.Path) -> Iterator[Any]:
    """The records of a `.wandb` file."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), _HEADER, b""
    while at + _HEADER <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:  # too short for a record: zero padding
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part, at = data[at + _HEADER : at + _HEADER + size], at + _HEADER + size
        parts = part if kind in (_WHOLE, _FIRST) else parts + part
        if kind in (_WHOLE, _LAST):
            yield wandb_internal_pb2.Record.FromString(parts)
