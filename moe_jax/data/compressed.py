"""Text files that are compressed: gz, bz2, xz and zst, read as one stream of bytes.

A file may hold several members one after the other (gzip members, bzip2 and xz streams, zstd
frames), as `cat a.gz b.gz` and parallel compressors write them: all are read.
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

# Text of a compressed file: at most MAX_RATIO times the file's bytes, beyond the first FREE_BYTES.
# zstd and gzip shrink text 3 to 10 times and logs up to 100 times.  One word repeated
# shrinks 30,000 times: a file of some KiB would fill any disk.
MAX_RATIO = 1000
FREE_BYTES = 64 << 20
BLOCK = 1 << 16  # compressed bytes that are read at once
BUFFER = 1 << 18  # bytes of text that are decompressed at once
_PADDING = b"\0"  # after a member: up to a block of a tape or, in xz, to four bytes
XZ_MEMORY = 512 << 20  # bytes; `xz -9` needs 65 MiB to decompress, a damaged header asks for more


class Bound:
    """The limit to the text of a compressed file, by the size of the file.

    Args:
      path: the compressed file.
    """

    def __init__(self, path: epath.Path):
        self._path, self._size, self._seen = path, path.stat().length, 0

    def add(self, amount: int) -> None:
        """Counts bytes of text; raises UserError where they are too many."""
        self._seen += amount
        self.check(self._seen)

    def check(self, amount: int) -> None:
        """Raises UserError where `amount` bytes of text are too many for the file."""
        if amount > FREE_BYTES + MAX_RATIO * self._size:
            raise UserError(
                f"{self._path} expands without bound: its {self._size:,} bytes make more than "
                f"{MAX_RATIO} times as many of text: leave it out, or write it without compression "
                f"if the text is meant to repeat itself so."
            )


class _Decoder(Protocol):
    """Decompresses one member, as bz2.BZ2Decompressor does."""

    eof: bool
    needs_input: bool
    unused_data: bytes

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """A decoder of one gzip member."""

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
        # A full buffer may leave text inside zlib although all input is used up.
        self.needs_input = not self._zlib.unconsumed_tail and len(found) < max_length
        return found


def _read_members(make: Callable[[], Any], file: IO[bytes]) -> Callable[[int], bytes]:
    """Function that reads up to n bytes of the text of all members; b"" at the end."""
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
    """As `_read_members`, for zstd."""
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
    """A file's name and the suffix of its compression; the latter is empty for a plain file."""
    stem, suffix = posixpath.splitext(name)
    return (stem, suffix.lower()) if suffix.lower() in _FORMATS else (name, "")


@contextlib.contextmanager
def open_text(path: epath.Path) -> Iterator[IO[bytes]]:
    """The bytes of a text file, decompressed if its suffix says that it is compressed.

    Raises:
      UserError: while it is read: a file that is cut or damaged, or that expands without bound.
    """
    _, suffix = split_name(path.name)
    with path.open("rb") as file:
        if not suffix:
            yield file
            return
        with io.BufferedReader(_Stream(path, _FORMATS[suffix](file)), BUFFER) as stream:
            yield stream


class _Stream(io.RawIOBase):
    """The text of a compressed file, from a function that reads up to n bytes of it."""

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
            if "truncated" in why.lower():  # Arrow's word for it
                raise self._cut() from None
            raise UserError(
                f"{self._path} cannot be decompressed ({why or type(error).__name__}): bring a "
                f"whole copy or leave it out."
            ) from None
        self._bound.add(len(found))
        buffer[: len(found)] = found
        return len(found)

    def _cut(self) -> UserError:
        return UserError(
            f"{self._path} is cut: its compressed data ends too early: bring a whole copy or leave "
            f"it out."
        )
