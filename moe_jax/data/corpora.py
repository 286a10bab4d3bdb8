"""Documents of a corpus, in an order that never changes.

A corpus is one or several streams (one per mixture entry); a stream is a sorted list of files; a
file holds documents.  Names are relative to the files' common folder (or to the standard
library), so nothing here depends on where the text lies.
"""

import contextlib
import dataclasses
import glob
import hashlib
import os
import posixpath
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import NamedTuple

from etils import epath

from moe_jax.data.config import DataConfig
from moe_jax.data.readers import READERS, read_pieces
from moe_jax.errors import UserError
from moe_jax.files.schemes import check_scheme, reach

MAX_FILE_LABELS = 64  # more files than this share one source label
STDLIB_SKIP = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".md": "text",
    ".parquet": "parquet",
    ".text": "text",
    ".txt": "text",
}
COMPRESSED = (".7z", ".br", ".bz2", ".gz", ".lz4", ".rar", ".tar", ".tgz", ".xz", ".zip", ".zst")


class SourceFile(NamedTuple):
    """One file of a stream."""

    name: str  # relative, with forward slashes
    path: epath.Path
    source: str  # label that losses are reported under


def _nobody_waits() -> None:
    pass


class Document(NamedTuple):
    """One document; `source` is its label."""

    name: str  # the file's, and the document's place in it
    source: str
    text: str


@dataclasses.dataclass(frozen=True)
class Stream:
    """The files of one corpus, or of one entry of a mixture."""

    name: str
    kind: str  # stdlib | text | jsonl | parquet
    field: str  # JSONL field or Parquet column
    weight: float
    files: tuple[SourceFile, ...]
    heldout_files: tuple[SourceFile, ...] = ()  # the whole held-out text; empty: a share of `files`
    key: str = "data"  # where the config describes it
    alive: Callable[[], None] = _nobody_waits  # called for each document or block that was read

    @property
    def sources(self) -> tuple[str, ...]:
        """The stream's source labels, in order of appearance."""
        return tuple(dict.fromkeys(file.source for file in (*self.files, *self.heldout_files)))

    def documents(self) -> Iterator[Document]:
        """Every document of `files` that is not empty.

        Raises:
          UserError: a file that is empty or cannot be read as its kind, naming file and place.
        """
        return self._documents(self.files)

    def heldout_documents(self) -> Iterator[Document]:
        """Every document of `heldout_files` that is not empty; raises as `documents`."""
        return self._documents(self.heldout_files)

    def _documents(self, files: tuple[SourceFile, ...]) -> Iterator[Document]:
        read = READERS[self.kind]
        if self.kind == "text" and len(files) == 1:
            read = read_pieces  # a lone document could not be split into train and held-out
        for file in files:
            with _reading(file.path):
                texts = read(file.path, self.field, f"{self.key}.field")
                for number, text in enumerate(texts):
                    self.alive()
                    if text:
                        yield Document(f"{file.name}#{number}", file.source, text)

    def digests(self) -> Iterator[tuple[str, str]]:
        """(relative name, SHA-256 of the content) of every file, held-out ones last."""
        for file in (*self.files, *self.heldout_files):
            sha = hashlib.sha256()
            with _reading(file.path), file.path.open("rb") as stream:
                while block := stream.read(1 << 20):
                    sha.update(block)
                    self.alive()
            yield file.name, sha.hexdigest()


def find_streams(
    config: DataConfig, alive: Callable[[], None] = _nobody_waits
) -> tuple[Stream, ...]:
    """The corpus that `config` describes; `alive` is called while it is read.

    Raises:
      UserError: a glob that matches no file, files whose kind does not follow from their suffix,
        or keys that contradict each other.
    """
    if config.mixture:
        return _find_mixture(config, alive)
    if config.source == "stdlib" and not config.files:
        if config.heldout_files:
            raise UserError("data.heldout_files is set without data.files: name those as well.")
        files = _stdlib_files(epath.Path(sysconfig.get_path("stdlib")))
        return (Stream("stdlib", "stdlib", config.field, 1.0, files, alive=alive),)
    files = _find_files(config.files, "data.files")
    heldout = _find_files(config.heldout_files, "data.heldout_files")
    asked = "" if config.source == "stdlib" else config.source
    kind = _kind(asked, files + heldout, "data")
    files, heldout = _label(files, kind), _label(heldout, kind)
    return (Stream(kind, kind, config.field, 1.0, files, heldout, alive=alive),)


def _find_mixture(config: DataConfig, alive: Callable[[], None]) -> tuple[Stream, ...]:
    for key in ("files", "heldout_files"):
        if getattr(config, key):
            raise UserError(
                f"data.{key} is set beside data.mixture, which names the {key} of each entry: "
                f"leave it empty or empty the mixture."
            )
    streams = []
    for name, part in config.mixture.items():
        key, asked = f"data.mixture.{name}", part.get("source", "")
        if asked == "stdlib":
            if part.get("files") or part.get("heldout_files"):
                raise UserError(
                    f"{key}.source is 'stdlib', which has files of its own: remove the entry's "
                    f"files, or its source."
                )
            kind, heldout = asked, ()
            files = _stdlib_files(epath.Path(sysconfig.get_path("stdlib")))
        else:
            files = _find_files(part.get("files", ""), f"{key}.files")
            heldout = _find_files(part.get("heldout_files", ""), f"{key}.heldout_files")
            kind = _kind(asked, files + heldout, key)
        files, heldout = (
            tuple(file._replace(source=name) for file in found) for found in (files, heldout)
        )
        weight, field = float(part.get("weight", 1.0)), part.get("field", "text")
        streams.append(Stream(name, kind, field, weight, files, heldout, key, alive))
    if len({bool(stream.heldout_files) for stream in streams}) > 1:
        without = next(stream.key for stream in streams if not stream.heldout_files)
        raise UserError(
            f"{without}.heldout_files is empty, and other entries of data.mixture name theirs: "
            f"name them in every entry or in none."
        )
    return tuple(streams)


def _find_files(globs: str, key: str) -> tuple[SourceFile, ...]:
    patterns = [pattern.strip() for pattern in globs.split(",") if pattern.strip()]
    if not patterns:
        if key.endswith("heldout_files"):
            return ()
        raise UserError(f"{key} is empty: name the files to train on.")
    paths: dict[str, epath.Path] = {}
    for pattern in patterns:
        check_scheme(pattern, key)
        with reach(pattern, key):
            found = _glob(pattern)
            if not found and epath.Path(pattern).expanduser().is_dir():
                raise UserError(
                    f"{key}: {pattern!r} is a folder: name the files in it, such as "
                    f"{posixpath.join(pattern, '*.txt')!r}."
                )
        if not found:
            raise UserError(f"{key}: no file matches {pattern!r}.")
        paths.update((os.fspath(path), path) for path in found)
    ordered = sorted(paths)
    folder = posixpath.commonpath([posixpath.dirname(path) for path in ordered])
    return tuple(
        SourceFile(posixpath.relpath(path, folder or "."), paths[path], "") for path in ordered
    )


def _kind(asked: str, files: tuple[SourceFile, ...], key: str) -> str:
    """How to read the files: as `asked` or, if that is empty, as their suffix says."""
    kinds: dict[str, str] = {}  # -> the first file of each
    for file in files:
        suffix = posixpath.splitext(file.name)[1].lower()
        if suffix in COMPRESSED:
            raise UserError(
                f"{key}.files: {file.path} is compressed ({suffix}), which is not read: decompress "
                f"it."
            )
        kinds.setdefault(asked or SUFFIXES.get(suffix, ""), file.name)
    if "" in kinds:
        raise UserError(
            f"{key}.files: the suffix of {kinds['']!r} does not tell how to read it (known: "
            f"{', '.join(SUFFIXES)}): set {key}.source to text, jsonl or parquet."
        )
    if len(kinds) > 1:
        named = " and ".join(f"{kind} ({name})" for kind, name in sorted(kinds.items()))
        raise UserError(
            f"{key}.files are of several kinds, {named}: name files of one, or write a "
            f"data.mixture with an entry for each."
        )
    return next(iter(kinds))


def _glob(pattern: str) -> list[epath.Path]:
    """Files (never folders) that match; absolute paths, or gs:// ones."""
    if "://" not in pattern:
        found = glob.glob(os.path.abspath(os.path.expanduser(pattern)), recursive=True)
        return [epath.Path(path) for path in found if os.path.isfile(path)]
    if "**" in pattern:
        raise UserError(f"{pattern!r}: ** is for local files only, name the folders with *.")
    scheme, _, rest = pattern.partition("://")
    bucket, _, inside = rest.partition("/")
    return [path for path in epath.Path(f"{scheme}://{bucket}").glob(inside) if not path.is_dir()]


def _label(files: tuple[SourceFile, ...], stream: str) -> tuple[SourceFile, ...]:
    """One source label a file when they are few, else one for all."""
    if len(files) > MAX_FILE_LABELS:
        return tuple(file._replace(source=stream) for file in files)
    return tuple(file._replace(source=posixpath.splitext(file.name)[0]) for file in files)


def _stdlib_files(root: epath.Path) -> tuple[SourceFile, ...]:
    """The *.py files of the standard library at `root`, labelled by top-level package.

    Left out: installed packages, tests, and what differs between two installations of the same
    Python (`_sysconfigdata*.py` and the `config-*` folder hold paths of the machine).
    """
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [n for n in subfolders if n.isidentifier() and n not in STDLIB_SKIP]
        relative = os.path.relpath(folder, root)
        for name in names:
            if name.endswith(".py") and not name.startswith(("_sysconfigdata", "sitecustomize")):
                inside = PurePosixPath(relative, name)
                label = inside.parts[0] if len(inside.parts) > 1 else "modules"
                files.append(SourceFile(str(inside), epath.Path(folder) / name, label))
    return tuple(sorted(files, key=lambda file: file.name))


@contextlib.contextmanager
def _reading(path: epath.Path) -> Iterator[None]:
    try:
        with reach(os.fspath(path), "data.files"):
            yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}): change its permissions or leave "
            f"it out."
        ) from None
