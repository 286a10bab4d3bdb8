"""Tokenise a corpus into a store, once; a build that was killed goes on where it stopped.

A shard of tokens is written whole, then a part file that lists the documents which begin in it.
The part files are the journal: the next run counts them, skips the documents they list, and cuts
the tokens already written off the last of those.  So a resumed build is byte-identical to one
that was never stopped.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts
from etils import epath

from moe_jax.data.build_lock import Turn
from moe_jax.data.config import DataConfig
from moe_jax.data.corpora import Document, Stream, find_streams
from moe_jax.data.heldout import HoldOut, share_warnings
from moe_jax.data.store import (
    CODECS,
    MANIFEST,
    SOURCE,
    SPLITS,
    START,
    STORE_FORMAT,
    Store,
    array_digests,
    array_spec,
    damaged,
    first_line,
    key_value_store,
    open_store,
    read_manifest,
    sealed,
)
from moe_jax.data.tokenizers import Tokenizer, bos_ids, config_tokenizer
from moe_jax.errors import UserError
from moe_jax.files.schemes import check_scheme

CHUNK_TOKENS = 8192  # read at once for a random row: larger chunks cost more than they save
SHARD_TOKENS = 1 << 22  # one file
DOCUMENTS_CHUNK = 1 << 16  # documents
DIGEST_BYTES = 32  # of SHA-256, before the rows of a part file
ENCODE_CHARACTERS = 1 << 20  # text handed to the tokenizer at once


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the token arrays' chunks and files."""

    chunk: int = CHUNK_TOKENS  # tokens that are read at once
    shard: int = SHARD_TOKENS  # tokens in a file


class Fingerprints(NamedTuple):
    """SHA-256 of all that decides what a store holds; folders and weights do not."""

    fingerprint: str  # names the store's folder
    content: str  # without the names of files, which only label their text
    earlier: tuple[str, ...]  # what earlier formats gave to a store of the same tokens


def build_store(
    config: DataConfig,
    root: str | os.PathLike,
    progress: Callable[[str], None] | None = None,
    layout: Layout = Layout(),
    alive: Callable[[], None] = lambda: None,
) -> Store:
    """The store of `config` under `root`: opened if it is there, else built (or finished).

    Stores lie in folders named by their fingerprint, so a changed file, tokenizer or split never
    meets an old store.  Of several processes of one machine, one builds and the others wait.

    Args:
      config: the corpus, its tokenizer and the split.
      root: folder of all stores, local or gs://.
      progress: called with a line of text now and then; None: nothing is told.
      layout: chunk and shard sizes.
      alive: called whenever some text was read, here or by the process that builds meanwhile.

    Returns:
      The store, open for reading.

    Raises:
      UserError: input that cannot be used (see corpora.py, tokenizers.py), or a corpus too small
        to hold some of it out.
    """
    say = progress or (lambda line: None)
    root = _checked_root(root)
    tokenizer = config_tokenizer(config)
    turn = Turn(alive)
    streams = find_streams(config, turn.alive)
    known = store_fingerprints(config, streams, tokenizer, layout)
    path = root / known.fingerprint[:16]
    if read_manifest(path) is None:  # a finished store may lie where nobody can write
        with turn(root, path.name):
            if read_manifest(path) is None:  # nobody built it while this process waited
                say(f"building the store {path}")
                _write(path, config, streams, tokenizer, layout, known.fingerprint, say)
    store = _opened(path, streams, known)
    for line in share_warnings(store, config):
        say(line)
    return store


def find(config: DataConfig, root: str | os.PathLike, layout: Layout = Layout()) -> Store:
    """As `build_store`, but writes nothing: for configs that come from a file.

    Raises:
      UserError: as `build_store`, or the store is not there.
    """
    tokenizer, streams = config_tokenizer(config), find_streams(config)
    known = store_fingerprints(config, streams, tokenizer, layout)
    path = _checked_root(root) / known.fingerprint[:16]
    if read_manifest(path) is None:
        raise UserError(f"There is no store {path}: build it with python -m moe_jax data.")
    return _opened(path, streams, known)


def _opened(path: epath.Path, streams: tuple[Stream, ...], known: Fingerprints) -> Store:
    store = open_store(path, [stream.weight for stream in streams], known.earlier, known.content)
    if store.fingerprint != known.fingerprint:
        raise UserError(f"{path} holds another store than its name says: delete it.")
    return store


def store_root(config: DataConfig, workdir: str | os.PathLike) -> epath.Path:
    """Where the stores of a run in `workdir` lie: data.store, or WORKDIR/../stores."""
    folder = epath.Path(workdir).expanduser()
    if not config.store:
        return (folder if "://" in os.fspath(workdir) else folder.resolve()).parent / "stores"
    return _checked_root(config.store)


def _checked_root(root: str | os.PathLike) -> epath.Path:
    """The folder of stores; raises UserError for a URL that TensorStore would take for a folder."""
    check_scheme(os.fspath(root), "data.store")
    return epath.Path(root).expanduser()


def store_fingerprints(
    config: DataConfig, streams: tuple[Stream, ...], tokenizer: Tokenizer, layout: Layout
) -> Fingerprints:
    """The fingerprints of the store of a config."""
    fraction = config.heldout_fraction
    digests = [list(stream.digests()) for stream in streams]  # reads every file
    payload: dict[str, Any] = {
        "format": 2,
        "layout": dataclasses.asdict(layout),
        "tokenizer": tokenizer.identity,
        "heldout_fraction": fraction,
        "streams": [
            [stream.name, stream.kind, stream.field, stream.sources, files]
            for stream, files in zip(streams, digests, strict=True)
        ],
    }
    heldout = [len(stream.heldout_files) for stream in streams]
    changed = {
        "format": STORE_FORMAT,
        "bos": config.begin_with_bos,
        "heldout_fraction": None if any(heldout) else fraction,
        "heldout_files": heldout,  # of each stream's digests, these many last ones
    }
    # Format 2 wrote the same tokens but for tokenizers from files, whose identity is another now.
    same = not config.begin_with_bos and not any(heldout)
    unnamed = [
        [stream.name, stream.kind, stream.field, [digest for _, digest in files]]
        for stream, files in zip(streams, digests, strict=True)
    ]
    return Fingerprints(
        _sha256(payload | changed),
        _sha256(payload | changed | {"streams": unnamed}),
        (_sha256(payload),) if same else (),
    )


def _sha256(payload: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(payload).encode()).hexdigest()


def _write(
    path: epath.Path,
    config: DataConfig,
    streams: tuple[Stream, ...],
    tokenizer: Tokenizer,
    layout: Layout,
    fingerprint: str,
    say: Callable[[str], None],
) -> None:
    """Write both splits, then the manifest that makes the store a finished one."""
    hold_out = HoldOut(streams, config.heldout_fraction)
    sources = [source for stream in streams for source in stream.sources]
    ids = {source: i for i, source in enumerate(sources)}
    stream_of = np.repeat(np.arange(len(streams)), [len(stream.sources) for stream in streams])
    bounds = {}
    bos = bos_ids(config, tokenizer)
    for split in SPLITS:
        writer = _SplitWriter(path / split, tokenizer, layout, ids, bos)
        documents = hold_out.split(split)
        total, table = writer.write(documents, lambda line, split=split: say(f"{split}: {line}"))
        first = np.searchsorted(stream_of[table[:, SOURCE]], np.arange(len(streams)))
        bounds[split] = [*table[first, START].tolist(), total]
    manifest = {
        "format": STORE_FORMAT,
        "fingerprint": fingerprint,
        "tokenizer": tokenizer.identity,
        "vocab_size": tokenizer.vocab_size,
        "bos_ids": list(bos),
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "streams": [stream.name for stream in streams],
        "sources": sources,
        "splits": bounds,
    }
    folder = key_value_store(path)
    with _writing(path):
        manifest["arrays"] = array_digests(folder)
        folder.write(MANIFEST, sealed(manifest)).result()
    if hold_out.left_out:
        say(f"train: {hold_out.left_out:,} documents left out, which are also held out")
    for split in SPLITS:
        folder.delete_range(ts.KvStore.KeyRange(f"{split}/parts/", f"{split}/parts0")).result()


class _SplitWriter:
    """Writes one split, shard by shard."""

    def __init__(
        self,
        path: epath.Path,
        tokenizer: Tokenizer,
        layout: Layout,
        source_ids: dict[str, int],
        bos: tuple[int, ...],
    ):
        self._path = path
        self._tokenizer = tokenizer
        self._layout = layout
        self._source_ids = source_ids
        self._bos = np.array(bos, np.int64)
        self._folder = key_value_store(path)
        self._parts = self._read_parts()
        spec = array_spec(path / "tokens")
        if self._parts:
            try:
                self._tokens: Any = ts.open(spec).result()
            except Exception as error:  # tensorstore raises ValueError and others
                raise damaged(
                    f"{path} cannot be read ({first_line(error)})", path.parent
                ) from error
        else:
            dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
            with _writing(path):
                self._tokens = self._create("tokens", _tokens_metadata(layout, dtype))

    def write(
        self, documents: Iterator[Document], say: Callable[[str], None]
    ) -> tuple[int, np.ndarray]:
        """Write the split; returns its tokens and its documents [documents, 3]."""
        start = end = len(self._parts) * self._layout.shard  # next document's, next token's place
        if self._parts:  # the last document listed may go on: tokenise it again
            known = np.concatenate(self._parts)
            start = int(known[-1, START])
            documents = itertools.islice(documents, len(known) - 1, None)
            say(f"resuming after {end:,} tokens")
        buffer = np.empty(self._layout.shard, self._tokens.dtype.numpy_dtype)
        filled, rows = 0, []
        for document, ids in self._encoded(documents):
            if start == end:
                size = len(document.text.encode("utf-8")) + 1  # the eos counts as one byte
                rows.append((start, size, self._source_ids[document.source]))
            rest = ids[end - start :]
            start = end = start + len(ids)
            while len(rest):
                piece = rest[: len(buffer) - filled]
                buffer[filled : filled + len(piece)] = piece
                filled, rest = filled + len(piece), rest[len(piece) :]
                if filled == len(buffer):
                    self._write_tokens(buffer, len(self._parts))
                    self._write_part(np.array(rows, np.int64).reshape(-1, 3))
                    filled, rows = 0, []
                    say(f"{len(self._parts) * len(buffer):,} tokens")
        if filled:
            self._write_tokens(buffer[:filled], len(self._parts))
        table = np.concatenate([*self._parts, np.array(rows, np.int64).reshape(-1, 3)])
        self._write_documents(table)
        say(f"{end:,} tokens in {len(table):,} documents")
        return end, table

    def _encoded(self, documents: Iterator[Document]) -> Iterator[tuple[Document, np.ndarray]]:
        """Each document with its bos, token ids and eos; the tokenizer gets many at once."""
        batch, size = [], 0
        for document in documents:
            batch.append(document)
            size += len(document.text)
            if size >= ENCODE_CHARACTERS:
                yield from self._encode(batch)
                batch, size = [], 0
        yield from self._encode(batch)

    def _encode(self, batch: list[Document]) -> Iterator[tuple[Document, np.ndarray]]:
        try:
            encoded = self._tokenizer.encode_batch([document.text for document in batch])
        except UserError as error:
            raise UserError(f"{batch[0].name} to {batch[-1].name}: {error}") from None
        for document, ids in zip(batch, encoded, strict=True):
            if len(ids) and not 0 <= ids.min() <= ids.max() < self._tokenizer.vocab_size:
                raise UserError(
                    f"{document.name}: the tokenizer gives ids {ids.min()} to {ids.max()}, beyond "
                    f"its {self._tokenizer.vocab_size}: use one whose vocabulary is whole."
                )
            yield (
                document,
                np.concatenate([self._bos, ids, [self._tokenizer.eos_id]], dtype=np.int64),
            )

    def _write_tokens(self, tokens: np.ndarray, shard: int) -> None:
        start = shard * self._layout.shard
        stop = start + len(tokens)
        with _writing(self._path):
            self._tokens = self._tokens.resize(exclusive_max=[stop]).result()
            self._tokens[start:stop].write(tokens).result()

    def _write_part(self, rows: np.ndarray) -> None:
        raw = rows.astype("<i8").tobytes()
        with _writing(self._path):
            value = hashlib.sha256(raw).digest() + raw
            self._folder.write(_part(len(self._parts)), value).result()
        self._parts.append(rows)

    def _read_parts(self) -> list[np.ndarray]:
        """The parts up to the first that is missing or damaged: the build goes on from there."""
        parts: list[np.ndarray] = []
        while True:
            try:
                value = self._folder.read(_part(len(parts))).result().value
            except Exception as error:  # tensorstore raises ValueError and others
                raise damaged(
                    f"{self._path} cannot be read ({first_line(error)})", self._path.parent
                ) from error
            digest, raw = value[:DIGEST_BYTES], value[DIGEST_BYTES:]
            if hashlib.sha256(raw).digest() != digest:
                return parts
            parts.append(np.frombuffer(raw, "<i8").reshape(-1, 3).astype(np.int64))

    def _write_documents(self, table: np.ndarray) -> None:
        metadata = {
            "shape": list(table.shape),
            "data_type": "int64",
            "chunk_grid": _regular([DOCUMENTS_CHUNK, 3]),
            "codecs": CODECS,
        }
        with _writing(self._path):
            self._create("documents", metadata).write(table).result()

    def _create(self, name: str, metadata: dict[str, Any]) -> Any:
        """An empty array in place of whatever a build that was stopped left there."""
        spec = array_spec(self._path / name) | {"metadata": metadata}
        return ts.open(spec, create=True, delete_existing=True).result()


def _part(number: int) -> str:
    return f"parts/{number:08d}"


def _regular(shape: list[int]) -> dict[str, Any]:
    return {"name": "regular", "configuration": {"chunk_shape": shape}}


def _tokens_metadata(layout: Layout, dtype: str) -> dict[str, Any]:
    """zarr3 metadata of an empty token array: checksummed chunks inside shards."""
    sharding = {"chunk_shape": [layout.chunk], "codecs": CODECS, "index_codecs": CODECS}
    return {
        "shape": [0],
        "data_type": dtype,
        "chunk_grid": _regular([layout.shard]),
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }


@contextlib.contextmanager
def _writing(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # tensorstore raises ValueError and others
        raise UserError(
            f"{path} cannot be written ({first_line(error)}): make room on its disk or set "
            f"data.store, then run the same command again: it goes on after what is whole."
        ) from error
