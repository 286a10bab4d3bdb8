"""Documents of a corpus, in an order that never changes.

A corpus is one or several streams (one per mixture entry); a stream is a sorted list of files; a
file holds documents.  Names are relative to the files' common folder (or to the standard
library), so nothing here depends on where the text lies.
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
    kind: str  # stdlib | text | jsonl | parquet | hf
    field: str  # JSONL field or column
    weight: float
    files: tuple[SourceFile, ...]
    heldout_files: tuple[SourceFile, ...] = ()  # the whole held-out text; empty: a share of `files`
    key: str = "data"  # where the config describes it
    alive: Callable[[], None] = _nobody_waits  # called for each document or block that was read
    notes: tuple[str, ...] = ()  # lines for the log
    # Notes the records that hold no text.
    bad: BadRecords = dataclasses.field(default_factory=BadRecords)
    limit: DocumentLimit = dataclasses.field(default_factory=DocumentLimit)  # to one document

    @property
    def sources(self) -> tuple[str, ...]:
        """The stream's source labels, in order of appearance."""
        return tuple(dict.fromkeys(file.source for file in (*self.files, *self.heldout_files)))

    def documents(self) -> Iterator[Document]:
        """Every document of `files` that is not empty.

        Raises:
          UserError: a file that cannot be read as its kind, or a record that holds no text under
            data.bad_records=stop, naming file and place.
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
                records = read(file.path, self.field, f"{self.key}.field", self.limit)
                for number, text in enumerate(records):
                    self.alive()
                    if isinstance(text, BadRecord):
                        self.bad.add(file.path, text)
                    elif text:
                        yield Document(f"{file.name}#{number}", file.source, text)

    def digests(self) -> Iterator[tuple[str, str]]:
        """(relative name, SHA-256 of the content) of every file, held-out ones last.

        A byte order mark is no text, so it is left out of the content of plain text files.
        """
        for file in (*self.files, *self.heldout_files):
            plain = self.kind == "text" and not split_name(file.name)[1]
            mark = BYTE_ORDER_MARK if plain else b""
            sha = hashlib.sha256()
            with _reading(file.path), file.path.open("rb") as stream:
                while block := stream.read(1 << 20):
                    sha.update(block.removeprefix(mark))
                    mark = b""
                    self.alive()
            yield file.name, sha.hexdigest()


def find_streams(
    config: DataConfig,
    alive: Callable[[], None] = _nobody_waits,
    cut: Cut | None = None,
) -> tuple[Stream, ...]:
    """The corpus that `config` describes.

    Args:
      config: which files, and how they are read.
      alive: called while they are read.
      cut: where the tokenizer lets a text be cut; None: nothing is encoded.

    Raises:
      UserError: a glob that matches no file, files whose kind does not follow from their suffix,
        or keys that contradict each other.
    """
    limit = DocumentLimit(config.max_document_bytes, cut)
    found = _find_mixture(config, alive) if config.mixture else (_find_corpus(config, alive),)
    return tuple(dataclasses.replace(stream, limit=limit) for stream in found)


def _find_corpus(config: DataConfig, alive: Callable[[], None]) -> Stream:
    """The one stream of a config without a mixture."""
    if config.source == "stdlib" and not config.files and config.heldout_files:
        raise UserError("data.heldout_files is set without data.files: name those as well.")
    asked = "" if config.source == "stdlib" and config.files else config.source
    entry = MixtureEntry(asked, config.files, config.field, 1.0, config.heldout_files)
    stream = _find_stream("", entry, "data", config, alive)
    return dataclasses.replace(stream, name=stream.kind)


def _find_mixture(config: DataConfig, alive: Callable[[], None]) -> tuple[Stream, ...]:
    for key in ("files", "heldout_files"):
        if getattr(config, key):
            raise UserError(
                f"data.{key} is set beside data.mixture, which names the {key} of each entry: "
                f"leave it empty or empty the mixture."
            )
    streams = []
    for name, entry in config.entries.items():
        key = f"data.mixture.{name}"
        if entry.source == "stdlib" and (entry.files or entry.heldout_files):
            raise UserError(
                f"{key}.source is 'stdlib', which has files of its own: remove the entry's "
                f"files, or its source."
            )
        streams.append(_find_stream(name, entry, key, config, alive))
    if len({bool(stream.heldout_files) for stream in streams}) > 1:
        without = next(stream.key for stream in streams if not stream.heldout_files)
        raise UserError(
            f"{without}.heldout_files is empty, and other entries of data.mixture name theirs: "
            f"name them in every entry or in none."
        )
    return tuple(streams)


def _find_stream(
    name: str, entry: MixtureEntry, key: str, config: DataConfig, alive: Callable[[], None]
) -> Stream:
    """The stream of an entry; one without a name labels its text by file."""
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
    return Stream(name, kind, entry.field, weight, files, heldout, key, alive, notes, bad)


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
