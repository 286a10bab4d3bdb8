"""Reads untrusted JSON files: a value, or a one-sentence UserError naming the file.

Also opens regular files safely and replaces a file's text atomically.
"""

import contextlib
import json
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import Any

from etils import epath

from moe_jax.errors import UserError

MAX_BYTES = 64 << 20  # bytes of one value; files that this program writes are far smaller
Path = pathlib.Path | epath.Path


def parse(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
      ValueError: the text is not JSON; the message says why in a few words.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at character {error.pos}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not {error.encoding.upper()} at byte {error.start}") from None
    except ValueError as error:  # Python limits the digits of an integer
        raise ValueError(f"a number is too long: {error}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def load(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is not JSON; the message says why in a few words.
    """
    with _opened(path) as file:
        return parse_limited(file)


def parse_limited(file: Any) -> Any:
    """The value of an open JSON file; raises OSError or ValueError as `load` does."""
    raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
    return parse(raw)


def read(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: the file cannot be read, or is not JSON.
    """
    try:
        with _reading(path):
            return load(path)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): restore a copy, or remove it.") from None


def read_lines(path: Path) -> list[bytes]:
    """The lines of a file, with their line ends; an unfinished last line has none.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: the file cannot be read.
    """
    with _reading(path), _opened(path) as file:
        return file.read().splitlines(keepends=True)


def replace_text(path: Path, text: str) -> None:
    """Replace the text of `path` atomically and durably.

    A crash leaves either the old or the new text; after the return, the new one.

    Raises:
      OSError: the file cannot be written.
    """
    if "://" in os.fspath(path):
        path.write_text(text)  # object stores replace whole objects
        return
    unfinished = path.with_name(f"{path.name}.new")
    try:
        with unfinished.open("wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError:
        with contextlib.suppress(OSError):  # the unfinished file would occupy a full disk
            unfinished.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    with contextlib.suppress(OSError):  # not every file system can fsync a folder
        os.fsync(folder)
    os.close(folder)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}): change its permissions or move it "
            f"away."
        ) from None


def open_regular(path: Path) -> Any:
    """Open a regular file for binary reading; refuse links, pipes and devices, and never block.

    Raises:
      OSError: it is not a regular file, or cannot be opened.
    """
    if "://" in os.fspath(path):
        return path.open("rb")
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is not a file")
    return os.fdopen(descriptor, "rb")


def is_file(path: Path) -> bool:
    """True if `path` is a regular file; False for a pipe, which epath calls a file."""
    return path.is_file() if "://" in os.fspath(path) else os.path.isfile(path)


def _opened(path: Path) -> Any:
    if path.exists() and not is_file(path):  # opening a pipe would wait for a writer
        raise OSError("it is not a file")
    return path.open("rb")
