"""JSON that anybody may have written: a value, or one sentence that names the file."""

import json
import pathlib
from typing import Any

from etils import epath

from moe_jax.errors import UserError

LARGEST = 64 << 20  # bytes of one value; what this program writes stays far below
Path = pathlib.Path | epath.Path


def parse(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
      ValueError: whatever is wrong with it, in a few words.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at character {error.pos}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not {error.encoding.upper()} at byte {error.start}") from None
    except ValueError as error:  # Python's limit to digits
        raise ValueError(f"a number is too long: {error}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: it cannot be read, or is not JSON.
    """
    raw = _contents(path, LARGEST + 1)
    try:
        if len(raw) > LARGEST:
            raise ValueError(f"larger than {LARGEST >> 20} MiB")
        return parse(raw)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): bring a copy back, or remove it.") from None


def read_lines(path: Path) -> list[bytes]:
    """The lines of a file, each with its end; the last has none where it was never finished.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: it cannot be read.
    """
    return _contents(path).splitlines(keepends=True)


def _contents(path: Path, limit: int = -1) -> bytes:
    if path.exists() and not path.is_file():  # opening a pipe would wait for its other end
        raise UserError(f"{path} is not a file: move it away.")
    try:
        with path.open("rb") as file:
            return file.read(limit)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}): change its permissions."
        ) from None
