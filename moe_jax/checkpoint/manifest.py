"""The SHA-256 manifest of one checkpoint, which detects flipped bits and truncated files.

Orbax checksums almost nothing: a flipped payload byte loads as wrong weights.  The manifest lists
every file of the checkpoint with its size and SHA-256.  Process 0 writes it after the per-process
files were merged and before the checkpoint is committed, so a committed checkpoint always has one.
The files that Orbax writes to commit it are added afterwards (`seal`).  A kill may prevent this
addition; the checkpoint is then still valid.
"""

import hashlib
import json
import math
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from etils import epath

from moe_jax.checkpoint.declared import check_declared
from moe_jax.errors import one_line
from moe_jax.files import json_files, records

MANIFEST = "manifest.json"
COMMIT = "commit_success.txt"  # Orbax's marker, written last
_INDEX = "manifest.ocdbt"  # TensorStore's index of the arrays
_AT_COMMIT = (COMMIT, "_CHECKPOINT_METADATA")  # the commit writes or changes these files
_FORMAT = 1
# Bytes per block.  Between blocks a hashing thread needs the interpreter lock, which the training
# loop may hold.
_BLOCK = 4 * 2**20
SLOWEST = 2**20  # bytes per second: reading a checkpoint fails if it is slower
# Files that Orbax and TensorStore read; hidden files belong to file systems and editors.
_READ_BY_ORBAX = re.compile(
    r"(manifest\.ocdbt|_METADATA|_sharding|(d|array_metadatas|ocdbt\.[^/]*)/(.*/)?[^./][^/]*)"
)
_READERS = min(8, os.cpu_count() or 1)  # hashing releases the interpreter lock


class Entry(NamedTuple):
    """One file of the checkpoint."""

    size: int  # bytes
    sha256: str  # 64 hex digits


def write(directory: epath.Path) -> None:
    """Write `directory`/manifest.json, listing all existing files; raises OSError."""
    names = sorted(name for name, _ in _files(directory) if name not in (MANIFEST, *_AT_COMMIT))
    with ThreadPoolExecutor(_READERS) as pool:
        entries = pool.map(lambda name: _entry(directory / name), names)
        files = dict(zip(names, entries, strict=True))
    (directory / MANIFEST).write_text(_text(files))


def seal(directory: epath.Path) -> None:
    """Add the files that the commit wrote; raises OSError, or ValueError for a damaged manifest.

    The manifest is replaced atomically: a kill leaves the old one or the new one.
    """
    files = _manifest(directory)
    files |= {name: _entry(directory / name) for name in _AT_COMMIT}
    json_files.replace_text(directory / MANIFEST, _text(files))


def incomplete(directory: epath.Path) -> str | None:
    """Return the first fault of the checkpoint in a few words; None if it has none.

    Every listed file must exist with its size; no content is read.  Unlisted files that Orbax would
    read are refused, and so is anything other than regular files and folders.
    """
    return _reason(lambda: _irregular(directory) or _sizes(directory, _listed(directory)))


def undeclared(directory: epath.Path) -> str | None:
    """Return why the arrays of a local, complete checkpoint do not fit its files; None: they do."""

    def check() -> None:
        files = _listed(directory)
        if _INDEX not in files:  # without it Orbax would read arrays in another format
            raise ValueError(f"{_INDEX} is missing")
        check_declared(directory, sum(entry.size for entry in files.values()))

    return None if _is_remote(directory) else _reason(check)


def verify(directory: epath.Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """Return the first file that differs from what was written, and why; None if there is none.

    Args:
      directory: directory of the checkpoint.
      share: (i, n): process i of n hashes only every n-th file from the i-th on.
    """
    return incomplete(directory) or _reason(lambda: _contents(directory, _listed(directory), share))


def committed(directory: epath.Path) -> bool:
    """True if the save of this checkpoint was completed, even if it was damaged later.

    gs:// cannot rename: a killed save may leave a manifest there, but not one that lists the
    marker.
    """
    if (directory / COMMIT).exists() or not (directory / MANIFEST).exists():
        return (directory / COMMIT).exists()
    try:
        return COMMIT in _manifest(directory)
    except (OSError, ValueError):
        return True  # the manifest was damaged later: a kill does not leave it like this


def size(directory: epath.Path) -> int:
    """Bytes of all files under `directory`."""
    files = (path for _, path in _files(directory) if json_files.is_file(path))
    return sum(path.stat().length for path in files)


def _files(directory: epath.Path, above: str = "") -> Iterator[tuple[str, epath.Path]]:
    """(name relative to the checkpoint, path) of every file."""
    for path in directory.iterdir():
        if path.is_dir() and not os.path.islink(path):  # links may form a cycle
            yield from _files(path, f"{above}{path.name}/")
        else:
            yield f"{above}{path.name}", path


def _entry(path: epath.Path, deadline: float = math.inf) -> Entry:
    """Size and hash of a file; raises TimeoutError if the monotonic clock passes `deadline`."""
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with json_files.open_regular(path) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            if time.monotonic() > deadline:
                raise TimeoutError(f"slower than {SLOWEST >> 20} MiB/s")
    return Entry(path.stat().length, digest.hexdigest())


def seconds_to_read(size: int) -> float:
    """The time limit in seconds for reading `size` bytes of a checkpoint."""
    return 60 + size / SLOWEST


def _text(files: dict[str, Entry]) -> str:
    plain = {name: entry._asdict() for name, entry in files.items()}
    return json.dumps({"format": _FORMAT, "files": plain}, indent=1, sort_keys=True) + "\n"


def _listed(directory: epath.Path) -> dict[str, Entry]:
    """The files that a committed checkpoint lists; raises ValueError or OSError."""
    if not (directory / COMMIT).exists():
        raise ValueError(f"{COMMIT} is missing: the save was never committed")
    try:
        return _manifest(directory)
    except ValueError as error:
        raise ValueError(f"{MANIFEST} is damaged: {error}") from None


def _manifest(directory: epath.Path) -> dict[str, Entry]:
    """The files in manifest.json; raises OSError if it is not a regular file, or ValueError."""
    with json_files.open_regular(directory / MANIFEST) as file:
        return _files_of(json_files.parse_limited(file))


def _irregular(directory: epath.Path) -> str | None:
    """A message naming the first entry of a local checkpoint that is no file or folder."""
    if _is_remote(directory):
        return None
    for name, path in _files(directory):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return f"{name} is a link, a pipe or a device: replace it by the file itself"
    return None


def _sizes(directory: epath.Path, files: dict[str, Entry]) -> str | None:
    for name, _ in _files(directory):
        if name not in files and _READ_BY_ORBAX.fullmatch(name):
            return f"{name} is not in {MANIFEST}"
    for name, expected in sorted(files.items()):
        path = directory / name
        if not json_files.is_file(path):
            return f"{name} is missing"
        found = path.stat().length
        if found != expected.size:
            return f"{name} has {found} bytes instead of {expected.size}"
    return None


def _contents(directory: epath.Path, files: dict[str, Entry], share: tuple[int, int]) -> str | None:
    deadline = time.monotonic() + seconds_to_read(sum(entry.size for entry in files.values()))

    def differs(name: str) -> bool:
        return _entry(directory / name, deadline).sha256 != files[name].sha256

    names = sorted(files)[share[0] :: share[1]]
    with ThreadPoolExecutor(_READERS) as pool:
        for name, bad in zip(names, pool.map(differs, names), strict=True):
            if bad:
                return f"{name} differs from what was written (SHA-256)"
    return None


def _is_remote(directory: epath.Path) -> bool:
    return "://" in os.fspath(directory)


def _reason(check: Callable[[], str | None]) -> str | None:
    """The fault that `check` returns, or the reason that it failed."""
    try:
        reason = check()
    except FileNotFoundError as error:
        reason = f"{os.path.basename(error.filename or MANIFEST)} is missing"
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
    except ValueError as error:
        reason = str(error)
    return None if reason is None else one_line(reason)


def _files_of(manifest: Any) -> dict[str, Entry]:
    """The files of a manifest; raises ValueError, also for a name outside its folder."""
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise ValueError(f"it is not of format {_FORMAT}")
    listed = manifest.get("files")
    if not isinstance(listed, dict) or not listed:
        raise ValueError("it lists no files")
    files = {}
    for name, entry in listed.items():
        if name.startswith("/") or ".." in name.split("/") or "\\" in name:
            raise ValueError(f"it names a file outside the step, {name!r}")
        try:
            files[name] = records.typed(Entry, entry)
        except ValueError:
            raise ValueError(f"its entry for {name!r} is malformed") from None
    return files
