"""Reads the documents of a corpus in a fixed order.

A corpus is one or several streams (one per mixture entry); a stream is a sorted list of files; a
file holds documents.  Names are relative to the files' common folder (or to the standard
library), so nothing here depends on where the files are stored.
"""

import contextlib
import dataclasses
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from typing import NamedTuple

from etils import epath

from moe_jax.data.bad_records import BadRecord, BadRecords
from moe_jax.data.compressed import split_name
from moe_jax.data.config import DataConfig, MixtureEntry
from moe_jax.data.long_documents import Cut, DocumentLimit
from moe_jax.data.readers import BYTE_ORDER_MARK, READERS, read_pieces
from moe_jax.data.source_files import SourceFile, check_kind, find_files, label, stdlib_files
from moe_jax.errors import UserError
from moe_jax.files.schemes import reach


def _no_report() -> None:
    pass


class Document(NamedTuple):
    """One document; `source` is its label."""

    name: str  # the file's name and the document's number in it
    source: str
    text: str


@dataclasses.dataclass(frozen=True)
class Stream:
    """The files of one corpus, or of one entry of a mixture."""

    name: str
    kind: str  # stdlib | text | jsonl | parquet | hf
    field: str  # JSONL field or column
    weight: float
    files: tuple[SourceFile, ...]
    heldout_files: tuple[SourceFile, ...] = ()  # the whole held-out text; empty: a share of `files`
    key: str = "data"  # section of the config that describes it
    on_progress: Callable[[], None] = _no_report  # called for each document or block that was read
    notes: tuple[str, ...] = ()  # lines for the log
    # Collects the records that hold no text.
    bad: BadRecords = dataclasses.field(default_factory=BadRecords)
    limit: DocumentLimit = dataclasses.field(default_factory=DocumentLimit)  # to one document

    @property
    def sources(self) -> tuple[str, ...]:
        """The stream's source labels, in order of appearance."""
        return tuple(dict.fromkeys(file.source for file in (*self.files, *self.heldout_files)))

    def documents(self) -> Iterator[Document]:
        """Yield every document of `files` that is not empty.

        Raises:
          UserError: a file cannot be read as its kind or, under data.bad_records=stop, a record
            holds no text; names file and record.
        """
        return self._documents(self.files)

    def heldout_documents(self) -> Iterator[Document]:
        """Yield every document of `heldout_files` that is not empty; raises as `documents`."""
        return self._documents(self.heldout_files)

    def _documents(self, files: tuple[SourceFile, ...]) -> Iterator[Document]:
        read = READERS[self.kind]
        if self.kind == "text" and len(files) == 1:
            read = read_pieces  # a lone document could not be split into train and held-out
        for file in files:
            with _reading(file.path):
                records = read(file.path, self.field, f"{self.key}.field", self.limit)
                for number, text in enumerate(records):
                    self.on_progress()
                    if isinstance(text, BadRecord):
                        self.bad.add(file.path, text)
                    elif text:
                        yield Document(f"{file.name}#{number}", file.source, text)

    def digests(self) -> Iterator[tuple[str, str]]:
        """Yield (relative name, SHA-256 of the content) of every file, held-out ones last.

        The content of a plain text file excludes its byte order mark, which is not text.
        """
        for file in (*self.files, *self.heldout_files):
            plain = self.kind == "text" and not split_name(file.name)[1]
            mark = BYTE_ORDER_MARK if plain else b""
            sha = hashlib.sha256()
            with _reading(file.path), file.path.open("rb") as stream:
                while block := stream.read(1 << 20):
                    sha.update(block.removeprefix(mark))
                    mark = b""
                    self.on_progress()
            yield file.name, sha.hexdigest()


def find_streams(
    config: DataConfig,
    on_progress: Callable[[], None] = _no_report,
    cut: Cut | None = None,
) -> tuple[Stream, ...]:
    """Find the streams of the corpus that `config` describes.

    Args:
      config: the files and how to read them.
      on_progress: called for each document or block that was read.
      cut: finds where the tokenizer allows a cut; None: nothing is encoded.

    Raises:
      UserError: a glob matches no file, the kind of a file does not follow from its suffix, or
        keys contradict each other.
    """
    limit = DocumentLimit(config.max_document_bytes, cut)
    found = (
        _find_mixture(config, on_progress)
        if config.mixture
        else (_find_corpus(config, on_progress),)
    )
    return tuple(dataclasses.replace(stream, limit=limit) for stream in found)


def _find_corpus(config: DataConfig, on_progress: Callable[[], None]) -> Stream:
    """The one stream of a config without a mixture."""
    if config.source == "stdlib" and not config.files and config.heldout_files:
        raise UserError("data.heldout_files is set without data.files: set data.files too.")
    asked = "" if config.source == "stdlib" and config.files else config.source
    entry = MixtureEntry(asked, config.files, config.field, 1.0, config.heldout_files)
    stream = _find_stream("", entry, "data", config, on_progress)
    return dataclasses.replace(stream, name=stream.kind)


def _find_mixture(config: DataConfig, on_progress: Callable[[], None]) -> tuple[Stream, ...]:
    for key in ("files", "heldout_files"):
        if getattr(config, key):
            raise UserError(
                f"data.{key} is set beside data.mixture, whose entries set their own {key}: clear "
                f"data.{key} or data.mixture."
            )
    streams = []
    for name, entry in config.entries.items():
        key = f"data.mixture.{name}"
        if entry.source == "stdlib" and (entry.files or entry.heldout_files):
            raise UserError(
                f"{key}.source is 'stdlib', which has files of its own: remove the entry's files "
                f"or its source."
            )
        streams.append(_find_stream(name, entry, key, config, on_progress))
    if len({bool(stream.heldout_files) for stream in streams}) > 1:
        without = next(stream.key for stream in streams if not stream.heldout_files)
        raise UserError(
            f"{without}.heldout_files is empty, but other entries of data.mixture set theirs: set "
            f"them in every entry or in none."
        )
    return tuple(streams)


def _find_stream(
    name: str, entry: MixtureEntry, key: str, config: DataConfig, on_progress: Callable[[], None]
) -> Stream:
    """Find the stream of an entry; without a name, its text is labelled by file."""
    notes: tuple[str, ...] = ()
    if entry.source == "stdlib":
        kind, heldout = "stdlib", ()
        files = stdlib_files(epath.Path(sysconfig.get_path("stdlib")))
    else:
        found = find_files(entry.files, f"{key}.files", entry.source)
        held = find_files(entry.heldout_files, f"{key}.heldout_files", entry.source)
        notes = (*found.notes, *held.notes)
        kind = check_kind(entry.source, found.files + held.files, key)
        files, heldout = label(found.files, kind), label(held.files, kind)
    if name:
        files, heldout = (
            tuple(file._replace(source=name) for file in each) for each in (files, heldout)
        )
    most = config.max_bad_records if entry.max_bad_records < 0 else entry.max_bad_records
    bad = BadRecords(entry.bad_records or config.bad_records, most, key)
    weight = float(entry.weight)
    return Stream(name, kind, entry.field, weight, files, heldout, key, on_progress, notes, bad)


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
