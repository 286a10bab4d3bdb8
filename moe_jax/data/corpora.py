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
from moe_jax.errors import UserError
from moe_jax.files import json_files

MAX_FILE_LABELS = 64  # more files than this share one source label
PARQUET_ROWS = 1024  # decoded at once: of long documents, 65,536 (the default) take gigabytes
PIECE_CHARACTERS = 8192  # a text corpus of a single file is cut into documents of about this size
STDLIB_SKIP = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


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
    alive: Callable[[], None] = _nobody_waits  # called for each document or block that was read

    @property
    def sources(self) -> tuple[str, ...]:
        """The stream's source labels, in order of appearance."""
        return tuple(dict.fromkeys(file.source for file in self.files))

    def documents(self) -> Iterator[Document]:
        """Every document that is not empty.

        Raises:
          UserError: a file that is empty or cannot be read as its kind, naming file and place.
        """
        read = READERS[self.kind]
        if self.kind == "text" and len(self.files) == 1:
            read = _read_pieces  # a lone document could not be split into train and held-out
        for file in self.files:
            with _reading(file.path):
                for number, text in enumerate(read(file.path, self.field)):
                    self.alive()
                    if text:
                        yield Document(f"{file.name}#{number}", file.source, text)

    def digests(self) -> Iterator[tuple[str, str]]:
        """(relative name, SHA-256 of the content) of every file."""
        for file in self.files:
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
      UserError: a glob that matches no file.
    """
    if not config.mixture:
        files = _find_files(config.source, config.files, "data")
        if config.source != "stdlib":
            files = _label(files, config.source)
        return (Stream(config.source, config.source, config.field, 1.0, files, alive),)
    streams = []
    for name, part in config.mixture.items():
        where = f"data.mixture.{name}"
        kind = part.get("source", "text")
        files = _find_files(kind, part.get("files", ""), where)
        files = tuple(file._replace(source=name) for file in files)
        weight = float(part.get("weight", 1.0))
        streams.append(Stream(name, kind, part.get("field", "text"), weight, files, alive))
    return tuple(streams)


def _find_files(kind: str, globs: str, where: str) -> tuple[SourceFile, ...]:
    if kind == "stdlib":
        return _stdlib_files(epath.Path(sysconfig.get_path("stdlib")))
    patterns = [pattern.strip() for pattern in globs.split(",") if pattern.strip()]
    if not patterns:
        raise UserError(f"{where}.files is empty: name the {kind} files to train on.")
    paths: dict[str, epath.Path] = {}
    for pattern in patterns:
        found = _glob(pattern)
        if not found:
            raise UserError(f"{where}.files: no file matches {pattern!r}.")
        paths.update((os.fspath(path), path) for path in found)
    ordered = sorted(paths)
    folder = posixpath.commonpath([posixpath.dirname(path) for path in ordered])
    return tuple(
        SourceFile(posixpath.relpath(path, folder or "."), paths[path], "") for path in ordered
    )


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
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}): change its permissions or leave "
            f"it out."
        ) from None


def _read_stdlib(path: epath.Path, field: str) -> Iterator[str]:
    del field
    try:
        yield path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return  # a few modules declare another encoding


def _read_text(path: epath.Path, field: str) -> Iterator[str]:
    del field
    raw = path.read_bytes()
    if not raw:
        raise UserError(f"{path} is empty: remove it from the files to train on.")
    try:
        yield raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 at byte offset {error.start}: convert it or leave it out."
        ) from None


def _read_pieces(path: epath.Path, field: str) -> Iterator[str]:
    """The file cut after line ends, so that a corpus of one file has documents to hold out."""
    for text in _read_text(path, field):
        start = 0
        while start < len(text):
            stop = start + PIECE_CHARACTERS
            stop = text.rfind("\n", start, stop) + 1 or stop
            yield text[start:stop]
            start = stop


def _read_jsonl(path: epath.Path, field: str) -> Iterator[str]:
    empty = True
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            empty = False
            if line.strip():
                yield _jsonl_field(line, field, f"{path} line {number}")
    if empty:
        raise UserError(f"{path} is empty: remove it from the files to train on.")


def _jsonl_field(line: bytes, field: str, where: str) -> str:
    try:
        record = json_files.parse(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}): fix or remove it.") from None
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        raise UserError(f"{where} has no text in field {field!r}: set data.field to one that has.")
    try:
        record[field].encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where} holds half a surrogate pair, which UTF-8 cannot: fix or remove it."
        ) from None
    return record[field]


def _read_parquet(path: epath.Path, field: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "Parquet files need pyarrow: install the extra, pip install 'moe_jax[data]'."
        ) from None
    with path.open("rb") as stream:
        with _arrow(f"{path} is not a Parquet file"):
            file = pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True)
            columns, declared = file.schema_arrow.names, file.metadata.num_rows
        if field not in columns:
            raise UserError(
                f"{path} has no column {field!r}: set data.field to one of {', '.join(columns)}."
            )
        if declared == 0:
            raise UserError(f"{path} is empty: remove it from the files to train on.")
        row = 0
        for group in range(file.num_row_groups):
            where = f"{path}, row group {group},"
            with _arrow(f"{where} cannot be read"):
                batches = file.iter_batches(PARQUET_ROWS, row_groups=[group], columns=[field])
            while True:
                with _arrow(f"{where} cannot be read after row {row}"):
                    batch = next(batches, None)
                if batch is None:
                    break
                for value in batch.column(0):
                    with _arrow(f"{path} row {row} is not UTF-8"):
                        text = value.as_py()
                    if not isinstance(text, str | None):
                        raise UserError(f"{path} row {row}: column {field!r} does not hold text.")
                    yield text or ""
                    row += 1
        if row != declared:
            raise UserError(
                f"{path} holds {row} rows and says that it has {declared}: fix or leave it out."
            )


@contextlib.contextmanager
def _arrow(what: str) -> Iterator[None]:
    """A damaged file makes Arrow raise errors of many kinds, OSError and ValueError among them."""
    try:
        yield
    except Exception as error:
        why = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{what} ({why}): fix or leave it out.") from None


# name of a kind -> the texts of one file of it
READERS: dict[str, Callable[[epath.Path, str], Iterator[str]]] = {
    "stdlib": _read_stdlib,
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}
