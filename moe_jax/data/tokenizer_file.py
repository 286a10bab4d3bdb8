"""Reads the file of a tokenizer, reports errors of its library, and computes its identity."""

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
    """Read the bytes of a tokenizer's file; raises UserError if it is missing or unreadable."""
    try:
        with reach(os.fspath(path), "data.tokenizer"):
            return path.expanduser().read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"data.tokenizer is {os.fspath(path)!r}, but there is no file of that name: set the "
            f"path of a tokenizer.json or a SentencePiece .model."
        ) from None
    except OSError as error:
        raise UserError(
            f"data.tokenizer: {path} cannot be read ({error.strerror or error}): change its "
            f"permissions or name another file."
        ) from None


@contextlib.contextmanager
def library(what: str) -> Iterator[None]:
    """Raise UserError if a tokenizer library fails, for example on a file of another format."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is not an Exception
        raise UserError(f"{what} ({str(error).rstrip('.')}): name another file.") from None


def identity(format: bytes, raw: bytes, ids: tuple[int | None, int, int]) -> str:
    """Hash (SHA-256) the file and the ids that tokenizer_config.json and the config decide.

    Args:
      format: of the file.
      raw: its bytes.
      ids: of bos, eos and padding.
    """
    return hashlib.sha256(format + b" 2" + json.dumps(ids).encode() + raw).hexdigest()


def special_ids(
    eos: int | None, pad: int | None, size: int, path: epath.Path
) -> tuple[int, int, int]:
    """Find (eos, pad, vocabulary size); missing tokens get ids after the vocabulary.

    Args:
      eos: id of the token that ends a document; None: the tokenizer has none.
      pad: id of padding; None: the tokenizer has none.
      size: of the vocabulary.
      path: of the tokenizer, for the error.

    Raises:
      UserError: int32 cannot hold the ids.
    """
    if eos is None:
        eos, size = size, size + 1
    if pad is None:
        pad, size = size, size + 1
    if size > LARGEST:
        raise UserError(f"{path} has token ids up to {size - 1}: name one with at most {LARGEST}.")
    return eos, pad, size
