"""The file of a tokenizer: its bytes, the errors of its library, and what names it."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator

from etils import epath

from moe_jax.errors import UserError
from moe_jax.files.schemes import reach

LARGEST = 2**31 - 1  # ids are int32 on the devices


def read_tokenizer_file(path: epath.Path) -> bytes:
    """The bytes of a tokenizer's file; raises UserError where it is missing or unreadable."""
    try:
        with reach(os.fspath(path), "data.tokenizer"):
            return path.expanduser().read_bytes()
    except FileNotFoundError:
        raise UserError(f"data.tokenizer: there is no file {path}: name another.") from None
    except OSError as error:
        raise UserError(
            f"data.tokenizer: {path} cannot be read ({error.strerror or error}): name a file that "
            f"can."
        ) from None


@contextlib.contextmanager
def library(what: str) -> Iterator[None]:
    """Raises UserError where a tokenizer library fails on a file that is not what it should be."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is not an Exception
        raise UserError(f"{what} ({str(error).rstrip('.')}): name another.") from None


def identity(format: bytes, raw: bytes, ids: tuple[int | None, int, int]) -> str:
    """SHA-256 over the file and the ids that its surroundings and the config decide.

    Args:
      format: of the file.
      raw: its bytes.
      ids: of bos, eos and padding.
    """
    return hashlib.sha256(format + b" 2" + json.dumps(ids).encode() + raw).hexdigest()


def special_ids(
    eos: int | None, pad: int | None, size: int, path: epath.Path
) -> tuple[int, int, int]:
    """(eos, pad, vocabulary size), adding ids after the vocabulary for those that are missing.

    Args:
      eos: id of the token that ends a document; None: it has none.
      pad: id of padding; None: it has none.
      size: of the vocabulary.
      path: of the tokenizer, for the error.

    Raises:
      UserError: ids that int32 does not hold.
    """
    if eos is None:
        eos, size = size, size + 1
    if pad is None:
        pad, size = size, size + 1
    if size > LARGEST:
        raise UserError(f"{path} has token ids up to {size - 1}: name one with at most {LARGEST}.")
    return eos, pad, size
