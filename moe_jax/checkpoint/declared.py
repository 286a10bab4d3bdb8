"""Compares the size that a step's arrays declare with the size of its files.

A manifest proves that files are unchanged, not that this program wrote them.  The metadata of a
hostile step may declare arrays of any size without data in the files, and chunks that decompress to
any size.  This program writes uncompressed and complete arrays, so its files are never smaller than
the arrays they hold.
"""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_jax.files import json_files, records

TIMEOUT = 300.0  # seconds to read the metadata of a step
MEMORY = 4 << 30  # bytes of memory that the reader may use
_READER = Path(__file__).with_name("read_declared.py")
_MAX_AXES = 32
_SLACK = 64 << 20  # bytes allowed for files of a step besides its arrays


def check_declared(directory: os.PathLike[str], files: int) -> None:
    """Check a local step whose files are regular, before any of its arrays is read.

    Args:
      directory: directory of the step.
      files: bytes of all its files.

    Raises:
      ValueError: the metadata cannot be read within `TIMEOUT` and `MEMORY`, or the arrays do not
        fit the files; the message says why in a few words.
    """
    arrays = _read(directory)
    declared = sum(_stored_bytes(name, array) for name, array in arrays.items())
    if declared > files:
        raise ValueError(f"its arrays declare {declared} bytes and its files hold {files}")
    if files > 2 * declared + _SLACK:
        raise ValueError(f"its files hold {files} bytes and its arrays declare only {declared}")


def _read(directory: os.PathLike[str]) -> dict[str, Any]:
    command = [sys.executable, "-P", str(_READER), os.fspath(directory), str(MEMORY)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"its metadata cannot be read within {TIMEOUT:g} s") from None
    if done.returncode < 0:
        raise ValueError(f"its metadata cannot be read within {MEMORY >> 30} GiB of memory")
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(f"its metadata cannot be read: {said[-1] if said else 'no reason given'}")
    return records.mapping(json_files.parse(done.stdout))


def _stored_bytes(name: str, array: Any) -> int:
    """Bytes of all chunks of an array, including the parts of chunks beyond its edges.

    Raises:
      ValueError: no run writes such an array.
    """
    array = records.mapping(array)
    if array.get("compressor") is not None or array.get("filters"):
        raise ValueError(f"its array {name!r} is compressed; runs write uncompressed arrays")
    try:
        shape, chunks = _sizes(array.get("shape")), _sizes(array.get("chunks"))
        itemsize = _dtype(records.text(array.get("dtype"))).itemsize
    except (ValueError, TypeError) as error:
        raise ValueError(f"the metadata of its array {name!r} is malformed: {error}") from None
    if len(shape) != len(chunks) or 0 in chunks:
        raise ValueError(f"its array {name!r} has shape {shape} and chunks {chunks}")
    pairs = zip(shape, chunks, strict=True)
    return itemsize * math.prod(-(-size // chunk) * chunk for size, chunk in pairs)


def _sizes(value: Any) -> list[int]:
    sizes = records.items(value)
    if len(sizes) > _MAX_AXES:
        raise ValueError(f"more than {_MAX_AXES} axes")
    return [records.count(size) for size in sizes]


def _dtype(name: str) -> np.dtype:
    """The dtype of a TensorStore name: NumPy's, or JAX's for bfloat16 and similar types."""
    try:
        return np.dtype(name)
    except TypeError:
        return jnp.dtype(name)
