"""Reads the files of an unpacked package, and decodes them."""

import codecs
import gzip
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.corpus.sources import Rule

COMPRESSED = (".gz", ".dz")  # dictzip is gzip
ARCHIVES = (".tar.xz", ".tar.gz")
DECLARED = re.compile(rb"(?:charset|coding)\s*[:= ]\s*[\"']?([-\w.]+)")
DECLARED_WITHIN = 2048  # bytes at the beginning of a file
# Of Python, whatever their name promises: they are no encodings of a text file.
NO_ENCODINGS = ("unicode_escape", "raw_unicode_escape", "punycode", "idna", "undefined", "utf-7")


# A dictionary of 40 MB has three bytes of Windows-1252; such bytes are repaired up to this share.
RARE = 1e-4
NO_UTF_8 = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of a byte


class File(NamedTuple):
    """A file that a rule takes."""

    path: str  # in the package, or in an archive of the package, below the archive's path
    rule: Rule
    raw: bytes


def read_files(tree: Path, rules: Sequence[Rule]) -> Iterator[File]:
    """Read every file that a rule takes; the first rule that matches its path counts.

    Args:
      tree: an unpacked package.  Links in it are left out.
      rules: files of an earlier rule come first, so that it keeps the documents both have.

    Returns:
      Files, sorted by path within each rule.  Members of archives, which are read as a stream, have
      the order of the archive and come last.
    """
    paths = sorted(
        path.relative_to(tree).as_posix()
        for path in tree.rglob("*")
        if path.is_file() and not path.is_symlink()
    )
    found = [(_first(rules, _plain_name(path)), path) for path in paths]
    for number, rule in enumerate(rules):
        for path in (path for taken, path in found if taken == number):
            yield File(path, rule, _read(tree / path))
    for path in paths:
        if path.endswith(ARCHIVES):
            yield from _read_archive(tree / path, path, rules)


def decode(raw: bytes) -> str | None:
    """Decode UTF-8, or what the file itself declares; None: it is no text.

    A few other bytes in a long file of UTF-8 are taken for Windows-1252.
    """
    declared = DECLARED.search(raw[:DECLARED_WITHIN])
    for encoding in ("utf-8-sig", declared[1].decode("ascii") if declared else ""):
        try:
            text = _codec(encoding)(raw)[0]
        except (LookupError, ValueError):  # unknown; UnicodeDecodeError
            continue
        return None if "\0" in text else text
    text, repaired = NO_UTF_8.subn(_windows, raw.decode("utf-8", "surrogateescape"))
    return text if repaired <= RARE * len(raw) and "\0" not in text else None


def _windows(byte: re.Match[str]) -> str:
    return bytes([ord(byte[0]) - 0xDC00]).decode("cp1252", "replace")


def _codec(encoding: str) -> Callable[[bytes], tuple[str, int]]:
    """The decoder of a text encoding; raises LookupError for any other."""
    info = codecs.lookup(encoding)
    if not getattr(info, "_is_text_encoding", True) or info.name.replace("-", "_") in {
        name.replace("-", "_") for name in NO_ENCODINGS
    }:
        raise LookupError(encoding)
    return info.decode


def _first(rules: Sequence[Rule], path: str) -> int | None:
    return next((i for i, rule in enumerate(rules) if rule.takes(path)), None)


def _plain_name(path: str) -> str:
    """The path without the suffix of a compressed file."""
    return path[:-3] if path.endswith(COMPRESSED) else path


def _read(path: Path) -> bytes:
    raw = path.read_bytes()
    return gzip.decompress(raw) if path.name.endswith(COMPRESSED) else raw


def _read_archive(file: Path, path: str, rules: Sequence[Rule]) -> Iterator[File]:
    with tarfile.open(file, "r|*") as archive:
        for member in archive:
            name = f"{path}/{member.name}"
            taken = _first(rules, name) if member.isfile() else None
            stream = archive.extractfile(member) if taken is not None else None
            if taken is not None and stream is not None:
                yield File(name, rules[taken], stream.read())
