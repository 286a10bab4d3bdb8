"""Reads compressed text files (gz, bz2, xz, zst) as one stream of bytes.

A file may hold several consecutive members (gzip members, bzip2 and xz streams, zstd frames), as
`cat a.gz b.gz` and parallel compressors write them: all are read.
"""

import bz2
import contextlib
import functools
import io
import lzma
import posixpath
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, Protocol

from etils import epath

from moe_jax.errors import UserError

# A compressed file may expand to FREE_BYTES plus MAX_RATIO times its own size.  zstd and gzip
# shrink text 3 to 10 times and logs up to 100 times.  One repeated word shrinks 30,000 times: a
# file of a few KiB could fill any disk.
MAX_RATIO = 1000
FREE_BYTES = 64 << 20
BLOCK = 1 << 16  # compressed bytes that are read at once
BUFFER = 1 << 18  # bytes of text that are decompressed at once
_PADDING = b"\0"  # after a member: up to one tape block or, in xz, up to four bytes
XZ_MEMORY = 512 << 20  # bytes; `xz -9` needs 65 MiB to decompress, a damaged header asks for more


class Bound:
    """The limit on the text of a compressed file, derived from the size of the file.

    Args:
      path: the compressed file.
    """

    def __init__(self, path: epath.Path):
        self._path, self._size, self._seen = path, path.stat().length, 0

    def add(self, amount: int) -> None:
        """Count bytes of text; raises UserError if the total exceeds the limit."""
        self._seen += amount
        self.check(self._seen)

    def check(self, amount: int) -> None:
        """Raise UserError if `amount` bytes of text exceed the limit of the file."""
        if amount > FREE_BYTES + MAX_RATIO * self._size:
            raise UserError(
                f"{self._path} expands without bound: its {self._size:,} bytes hold more than "
                f"{MAX_RATIO} times that much text. Leave it out, or store it without compression "
                f"if the text is meant to repeat itself."
            )


class _Decoder(Protocol):
    """Decompresses one member, as bz2.BZ2Decompressor does."""

    eof: bool
    needs_input: bool
    unused_data: bytes

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """Decompresses one gzip member."""

    def __init__(self):
        self._zlib = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        found = self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)
        # If the output buffer is full, zlib may hold text although all input is used up.
        self.needs_input = not self._zlib.unconsumed_tail and len(found) < max_length
        return found


def _read_members(make: Callable[[], Any], file: IO[bytes]) -> Callable[[int], bytes]:
    """Make a function that reads up to n bytes of the text of all members; b"" at the end."""
    decoder: _Decoder = make()
    waiting = b""  # the beginning of the next member

    def read(amount: int) -> bytes:
        nonlocal decoder, waiting
        while True:
            if decoder.eof:
                waiting = decoder.unused_data.lstrip(_PADDING)
                while not waiting:
                    block = file.read(BLOCK)
                    if not block:
                        return b""
                    waiting = block.lstrip(_PADDING)
                decoder = make()
            block = b""
            if decoder.needs_input:
                block, waiting = waiting or file.read(BLOCK), b""
                if not block:
                    raise EOFError
            found = decoder.decompress(block, amount)
            if found:
                return found

    return read


def _read_zstd(file: IO[bytes]) -> Callable[[int], bytes]:
    """Like `_read_members`, for zstd."""
    try:
        import pyarrow
    except ImportError:
        raise UserError(
            ".zst files need pyarrow: install the extra, pip install 'moe_jax[data]'."
        ) from None
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd").read


_FORMATS: dict[str, Callable[[IO[bytes]], Callable[[int], bytes]]] = {
    ".bz2": functools.partial(_read_members, bz2.BZ2Decompressor),
    ".gz": functools.partial(_read_members, _Gzip),
    ".xz": functools.partial(
        _read_members, functools.partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, XZ_MEMORY)
    ),
    ".zst": _read_zstd,
}


def split_name(name: str) -> tuple[str, str]:
    """Split a file's name from its compression suffix, which is empty for a plain file."""
    stem, suffix = posixpath.splitext(name)
    return (stem, suffix.lower()) if suffix.lower() in _FORMATS else (name, "")


@contextlib.contextmanager
def open_text(path: epath.Path) -> Iterator[IO[bytes]]:
    """Open a text file as bytes, decompressed if its suffix says that it is compressed.

    Raises:
      UserError: during reading: the file is truncated or damaged, or expands without bound.
    """
    _, suffix = split_name(path.name)
    with path.open("rb") as file:
        if not suffix:
            yield file
            return
        with io.BufferedReader(_Stream(path, _FORMATS[suffix](file)), BUFFER) as stream:
            yield stream


class _Stream(io.RawIOBase):
    """The text of a compressed file, read through a function that returns up to n bytes of it."""

    def __init__(self, path: epath.Path, read: Callable[[int], bytes]):
        self._path, self._read, self._bound = path, read, Bound(path)
        self._empty = not path.stat().length

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            found = b"" if self._empty else self._read(len(buffer))
        except EOFError:
            raise self._cut() from None
        except (zlib.error, lzma.LZMAError, OSError, ValueError, MemoryError) as error:
            why = " ".join(str(error).split()).rstrip(".")
            if "truncated" in why.lower():  # Arrow's message
                raise self._cut() from None
            raise UserError(
                f"{self._path} cannot be decompressed ({why or type(error).__name__}): copy it "
                f"again or leave it out."
            ) from None
        self._bound.add(len(found))
        buffer[: len(found)] = found
        return len(found)

    def _cut(self) -> UserError:
        return UserError(
            f"{self._path} is truncated: its compressed data ends too early. Copy it again or "
            f"leave it out."
        )
