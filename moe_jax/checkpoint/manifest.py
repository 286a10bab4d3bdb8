"""The SHA-256 manifest of one step: what makes a flipped bit or a cut file visible.

Orbax checksums next to nothing: a flipped payload byte loads as wrong weights.  The manifest lists
every file of the step with its size and SHA-256.  It is written by process 0 after the per-process
files were merged and before the step gets its final name, so a committed step always has one.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import cast

from etils import epath

MANIFEST = "manifest.json"
COMMIT = "commit_success.txt"  # Orbax's marker, written last
# Orbax writes these two at commit, after the manifest.
_UNHASHED = (MANIFEST, COMMIT, "_CHECKPOINT_METADATA")
_FORMAT = 1
_READERS = min(8, os.cpu_count() or 1)  # hashing releases the interpreter lock


def write(directory: epath.Path) -> None:
    """Writes `directory`/manifest.json over all files that are there; raises OSError."""
    names = sorted(name for name, _ in _files(directory) if name not in _UNHASHED)
    with ThreadPoolExecutor(_READERS) as pool:
        entries = pool.map(lambda name: _entry(directory / name), names)
        files = dict(zip(names, entries, strict=True))
    text = json.dumps({"format": _FORMAT, "files": files}, indent=1, sort_keys=True)
    (directory / MANIFEST).write_text(text + "\n")


def verify(directory: epath.Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """None if every file of the step is as it was written, else the reason in a few words.

    Args:
      share: (i, n): only every n-th file from the i-th on, of n processes that share the work.
    """
    try:
        if not (directory / COMMIT).exists():
            return f"{COMMIT} is missing: the save was never committed"
        files = _parse((directory / MANIFEST).read_text())
        with ThreadPoolExecutor(_READERS) as pool:
            names = sorted(files)[share[0] :: share[1]]
            reasons = pool.map(lambda name: _check(directory, name, files[name]), names)
            return next((reason for reason in reasons if reason), None)
    except FileNotFoundError as error:
        return f"{os.path.basename(error.filename or MANIFEST)} is missing"
    except UnicodeDecodeError:
        return f"{MANIFEST} is damaged: it is not text"
    except ValueError as error:
        return f"{MANIFEST} is damaged: {error}"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def committed(directory: epath.Path) -> bool:
    """Whether this is a step that was once saved, whatever became of it since."""
    return (directory / MANIFEST).exists() or (directory / COMMIT).exists()


def size(directory: epath.Path) -> int:
    """Bytes of all files under `directory`."""
    return sum(path.stat().length for _, path in _files(directory))


def _files(directory: epath.Path, above: str = "") -> Iterator[tuple[str, epath.Path]]:
    """(name relative to the step, path) of every file."""
    for path in directory.iterdir():
        if path.is_dir():
            yield from _files(path, f"{above}{path.name}/")
        else:
            yield f"{above}{path.name}", path


def _entry(path: epath.Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(cast(io.BufferedReader, file), "sha256").hexdigest()
    return {"size": path.stat().length, "sha256": digest}


def _check(directory: epath.Path, name: str, expected: dict[str, int | str]) -> str | None:
    path = directory / name
    if not path.exists():
        return f"{name} is missing"
    found = path.stat().length
    if found != expected["size"]:
        return f"{name} has {found} bytes instead of {expected['size']}"
    if _entry(path)["sha256"] != expected["sha256"]:
        return f"{name} differs from what was written (SHA-256)"
    return None


def _parse(text: str) -> dict[str, dict[str, int | str]]:
    """The files of a manifest; raises ValueError.  Names that leave the step are refused."""
    manifest = json.loads(text)
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise ValueError(f"it is not of format {_FORMAT}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise ValueError("it lists no files")
    for name, entry in files.items():
        if name.startswith("/") or ".." in name.split("/") or "\\" in name:
            raise ValueError(f"it names a file outside the step, {name!r}")
        if not isinstance(entry, dict) or set(entry) != {"size", "sha256"}:
            raise ValueError(f"its entry for {name!r} is malformed")
    return files
