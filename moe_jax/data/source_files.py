"""Finds the files of a corpus and their kinds."""

import glob
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import NamedTuple

from etils import epath

from moe_jax.data.compressed import split_name
from moe_jax.data.saved_datasets import hub_files, is_hub_name, saved_files
from moe_jax.errors import UserError
from moe_jax.files import json_files
from moe_jax.files.schemes import check_scheme, reach

MAX_FILE_LABELS = 64  # more files than this share one source label
STDLIB_SKIP = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
SUFFIXES = {
    ".arrow": "hf",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".md": "text",
    ".parquet": "parquet",
    ".text": "text",
    ".txt": "text",
}
COMPRESSIBLE = ("jsonl", "text")  # kinds that are read compressed
UNREAD = (".7z", ".br", ".lz4", ".rar", ".tar", ".tgz", ".zip")
_SEPARATOR = re.compile(r"(?<!\\),")  # of entries; \, is a comma in a name


class SourceFile(NamedTuple):
    """One file of a stream."""

    name: str  # relative, with forward slashes
    path: epath.Path
    source: str  # label that losses are reported under


class Found(NamedTuple):
    """The files that a config key names, and lines for the log."""

    files: tuple[SourceFile, ...] = ()
    notes: tuple[str, ...] = ()  # lines for the log


def find_files(entries: str, key: str, asked: str) -> Found:
    """Find the files that `entries` names, sorted.

    Args:
      entries: comma separated; each is a path, a folder, a glob or a name of the hub.
      key: config key of `entries`, for messages.
      asked: the kind that folders are searched for; empty: every kind.

    Raises:
      UserError: an entry matches nothing or cannot be reached.
    """
    parts = _split(entries)
    if not parts:
        if key.endswith("heldout_files"):
            return Found()
        raise UserError(f"{key} is empty: name the files to train on.")
    paths: dict[str, epath.Path] = {}
    notes = []
    for part in parts:
        found, left_out = _entry(part, key, asked)
        paths.update((os.fspath(path), path) for path in found)
        if left_out:
            several = sum(left_out.values())
            kinds = ", ".join(f"{n} {suffix or 'without suffix'}" for suffix, n in left_out.items())
            files = "file" if several == 1 else "files"
            notes.append(
                f"{key}: {part} has {several:,} {files} of other suffixes, left out: {kinds}"
            )
    ordered = sorted(paths)
    folder = posixpath.commonpath([posixpath.dirname(path) for path in ordered])
    files = tuple(
        SourceFile(posixpath.relpath(path, folder or "."), paths[path], "") for path in ordered
    )
    return Found(files, tuple(notes))


def _split(entries: str) -> list[str]:
    """Split a list into its entries; a list that is the name of a file is one entry."""
    if "," in entries and "://" not in entries and os.path.exists(os.path.expanduser(entries)):
        return [entries]
    parts = (part.strip().replace("\\,", ",") for part in _SEPARATOR.split(entries))
    return [part for part in parts if part]


def _entry(part: str, key: str, asked: str) -> tuple[list[epath.Path], Counter[str]]:
    """The files of one entry and, if it is a folder, the number of other files per suffix."""
    if is_hub_name(part):
        return hub_files(part, key), Counter()
    check_scheme(part, key)
    with reach(part, key):
        path = epath.Path(part if "://" in part else os.path.abspath(os.path.expanduser(part)))
        if path.is_dir():
            saved = saved_files(path, key) if asked in ("", "hf") else None
            return (saved, Counter()) if saved is not None else _folder(path, key, asked)
        found = [path] if json_files.is_file(path) else _glob(part)
    if not found:
        raise UserError(f"{key}: no file matches {part!r}.")
    return found, Counter()


def _folder(folder: epath.Path, key: str, asked: str) -> tuple[list[epath.Path], Counter[str]]:
    """The files below a folder that have a known suffix, and the number of others per suffix."""
    found, left_out = [], Counter()
    for path in _below(folder):
        kind = kind_of(path.name)
        if kind and asked in ("", kind):
            found.append(path)
        else:
            left_out[posixpath.splitext(path.name)[1].lower()] += 1
    if not found:
        what = f"{asked} files" if asked else f"files of a known suffix ({', '.join(SUFFIXES)})"
        raise UserError(
            f"{key}: the folder {os.fspath(folder)!r} has no {what}. Name files by a glob, such as "
            f"{posixpath.join(os.fspath(folder), '*.py')!r} with source text."
        )
    return found, left_out


def _below(folder: epath.Path) -> Iterator[epath.Path]:
    """Yield every file below a folder, except hidden files and those in hidden folders."""
    if not _is_remote(folder):
        for where, folders, names in os.walk(folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            paths = (os.path.join(where, n) for n in sorted(names) if not n.startswith("."))
            yield from (epath.Path(path) for path in paths if os.path.isfile(path))
        return
    for path in sorted(folder.iterdir(), key=os.fspath):
        if not path.name.startswith("."):
            yield from _below(path) if path.is_dir() else [path]


def _is_remote(path: epath.Path) -> bool:
    return "://" in os.fspath(path)


def _glob(pattern: str) -> list[epath.Path]:
    """The files (never folders) that match, as absolute or gs:// paths."""
    if "://" not in pattern:
        found = glob.glob(os.path.abspath(os.path.expanduser(pattern)), recursive=True)
        return [epath.Path(path) for path in found if os.path.isfile(path)]
    if "**" in pattern:
        raise UserError(f"{pattern!r}: ** works for local files only. Name the folders with *.")
    scheme, _, rest = pattern.partition("://")
    bucket, _, inside = rest.partition("/")
    return [path for path in epath.Path(f"{scheme}://{bucket}").glob(inside) if not path.is_dir()]


def kind_of(name: str) -> str:
    """The kind of a file by its suffix, without that of a compression; empty: unknown."""
    stem, compression = split_name(name)
    kind = SUFFIXES.get(posixpath.splitext(stem)[1].lower(), "")
    return "" if compression and kind not in COMPRESSIBLE else kind


def check_kind(asked: str, files: tuple[SourceFile, ...], key: str) -> str:
    """The kind of the files: `asked` or, if that is empty, the kind of their suffix.

    Args:
      asked: the source that the config names.
      files: all files of a stream.
      key: section of the config that describes the stream, for errors.

    Raises:
      UserError: the files are not supported, of unknown kind, or of several kinds.
    """
    kinds: dict[str, str] = {}  # -> the first file of each
    for file in files:
        stem, compression = split_name(file.name)
        suffix = posixpath.splitext(stem)[1].lower()
        inside = asked or SUFFIXES.get(suffix, "")
        if suffix in UNREAD or (compression and inside and inside not in COMPRESSIBLE):
            raise UserError(
                f"{key}.files: {file.path} is compressed ({compression or suffix}). Only text and "
                f"JSON lines may be, as .gz, .bz2, .xz or .zst of one file: unpack it."
            )
        kinds.setdefault(inside, file.name)
    if "" in kinds:
        raise UserError(
            f"{key}.files: the suffix of {kinds['']!r} does not tell how to read it (known: "
            f"{', '.join(SUFFIXES)}): set {key}.source to text, jsonl, parquet or hf."
        )
    if len(kinds) > 1:
        named = " and ".join(f"{kind} ({name})" for kind, name in sorted(kinds.items()))
        raise UserError(
            f"{key}.files are of several kinds, {named}: name files of one kind, or set "
            f"data.mixture with one entry per kind."
        )
    return next(iter(kinds))


def label(files: tuple[SourceFile, ...], stream: str) -> tuple[SourceFile, ...]:
    """Label each file with its name if they are few, else with the stream's name.

    Files of a saved dataset get the stream's name, because their own names are only numbers.
    """
    if stream == "hf" or len(files) > MAX_FILE_LABELS:
        return tuple(file._replace(source=stream) for file in files)
    return tuple(
        file._replace(source=posixpath.splitext(split_name(file.name)[0])[0]) for file in files
    )


def stdlib_files(root: epath.Path) -> tuple[SourceFile, ...]:
    """Find the *.py files of the standard library at `root`, labelled by top-level package.

    Leaves out installed packages, tests, and files that differ between two installations of the
    same Python (`_sysconfigdata*.py` and the `config-*` folder hold paths of the machine).
    """
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [n for n in subfolders if n.isidentifier() and n not in STDLIB_SKIP]
        relative = os.path.relpath(folder, root)
        for name in names:
            if name.endswith(".py") and not name.startswith(("_sysconfigdata", "sitecustomize")):
                inside = PurePosixPath(relative, name)
                top = inside.parts[0] if len(inside.parts) > 1 else "modules"
                files.append(SourceFile(str(inside), epath.Path(folder) / name, top))
    return tuple(sorted(files, key=lambda file: file.name))
