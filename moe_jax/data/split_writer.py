"""Writes one split of a store, shard by shard; a killed build resumes where it stopped.

A shard of tokens is written whole, then a part file that lists the documents that begin in it.
The next build counts the part files and skips all documents they list except the last.  It
tokenises that document again and drops those of its tokens that are already on disk.  A resumed
build is therefore byte-identical to one that was never stopped.
"""

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from moe_jax.data.corpora import Document
from moe_jax.data.encoding import Encoded, encode_documents
from moe_jax.data.long_documents import utf8_size
from moe_jax.data.rate import Rate
from moe_jax.data.store import (
    CODECS,
    START,
    array_spec,
    damaged_error,
    first_line,
    key_value_store,
)
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import UserError

CHUNK_TOKENS = 8192  # read at once for a random row: larger chunks cost more than they save
SHARD_TOKENS = 1 << 22  # tokens per file
DOCUMENTS_CHUNK = 1 << 16  # documents
PARTS = "parts"  # folder of the part files
DIGEST_BYTES = 32  # of SHA-256, before the rows of a part file


@dataclasses.dataclass(frozen=True)
class ChunkSizes:
    """Sizes of the token arrays' chunks and files."""

    chunk: int = CHUNK_TOKENS  # tokens that are read at once
    shard: int = SHARD_TOKENS  # tokens per file


LAYOUT = ChunkSizes()


class SplitWriter:
    """Writes one split, shard by shard."""

    def __init__(
        self,
        path: epath.Path,
        tokenizer: Tokenizer,
        layout: ChunkSizes,
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
                raise damaged_error(
                    f"{path} cannot be read ({first_line(error)})", path.parent
                ) from error
        else:
            dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
            with writing(path):
                self._tokens = self._create("tokens", _tokens_metadata(layout, dtype))

    def write(
        self,
        documents: Iterator[Document],
        say: Callable[[str], None],
        on_progress: Callable[[], None],
        threads: int,
    ) -> tuple[int, np.ndarray]:
        """Write the split.

        Args:
          documents: of the split, in order.
          say: called with one line per shard.
          on_progress: called when some text was encoded.
          threads: number of encoding threads.

        Returns:
          The number of tokens, and the documents [documents, 3].
        """
        # `place`: where the next piece begins; `end`: where the written tokens end.
        place = end = len(self._parts) * self._layout.shard
        if self._parts:  # the last document listed may continue: tokenise it again
            known = np.concatenate(self._parts)
            place = int(known[-1, START])
            documents = itertools.islice(documents, len(known) - 1, None)
            say(f"resuming after {end:,} tokens")
        buffer = np.empty(self._layout.shard, self._tokens.dtype.numpy_dtype)
        filled, rows, rate = 0, [], Rate()
        for piece in encode_documents(documents, self._tokenizer, threads):
            on_progress()
            if piece.first:
                size = utf8_size(piece.document.text) + 1  # the eos counts as one byte
                rate.add(size)
                if place == end:
                    rows.append((place, size, self._source_ids[piece.document.source]))
            ids = self._with_marks(piece)
            rest = ids[max(0, end - place) :]
            place, end = place + len(ids), max(end, place + len(ids))
            while len(rest):
                part = rest[: len(buffer) - filled]
                buffer[filled : filled + len(part)] = part
                filled, rest = filled + len(part), rest[len(part) :]
                if filled == len(buffer):
                    self._write_tokens(buffer, len(self._parts))
                    self._write_part(np.array(rows, np.int64).reshape(-1, 3))
                    filled, rows = 0, []
                    say(f"{len(self._parts) * len(buffer):,} tokens, read {rate}")
        if filled:
            self._write_tokens(buffer[:filled], len(self._parts))
        table = np.concatenate([*self._parts, np.array(rows, np.int64).reshape(-1, 3)])
        self._write_documents(table)
        say(f"{end:,} tokens in {len(table):,} documents")
        return end, table

    def _with_marks(self, piece: Encoded) -> np.ndarray:
        """The ids of a piece, with bos if it begins its document and eos if it ends it."""
        bos = self._bos if piece.first else self._bos[:0]
        eos = np.array([self._tokenizer.eos_id][: int(piece.last)], np.int64)
        return np.concatenate([bos, piece.ids, eos], dtype=np.int64)

    def _write_tokens(self, tokens: np.ndarray, shard: int) -> None:
        start = shard * self._layout.shard
        stop = start + len(tokens)
        with writing(self._path):
            self._tokens = self._tokens.resize(exclusive_max=[stop]).result()
            self._tokens[start:stop].write(tokens).result()

    def _write_part(self, rows: np.ndarray) -> None:
        raw = rows.astype("<i8").tobytes()
        with writing(self._path):
            value = hashlib.sha256(raw).digest() + raw
            self._folder.write(_part(len(self._parts)), value).result()
        self._parts.append(rows)

    def _read_parts(self) -> list[np.ndarray]:
        """Read the parts up to the first that is missing or damaged, where the build resumes."""
        parts: list[np.ndarray] = []
        while True:
            try:
                value = self._folder.read(_part(len(parts))).result().value
            except Exception as error:  # tensorstore raises ValueError and others
                raise damaged_error(
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
        with writing(self._path):
            self._create("documents", metadata).write(table).result()

    def _create(self, name: str, metadata: dict[str, Any]) -> Any:
        """Create an empty array, in place of one that a stopped build has left."""
        spec = array_spec(self._path / name) | {"metadata": metadata}
        return ts.open(spec, create=True, delete_existing=True).result()


def _part(number: int) -> str:
    return f"{PARTS}/{number:08d}"


def _regular(shape: list[int]) -> dict[str, Any]:
    return {"name": "regular", "configuration": {"chunk_shape": shape}}


def _tokens_metadata(layout: ChunkSizes, dtype: str) -> dict[str, Any]:
    """The zarr3 metadata of an empty token array: checksummed chunks inside shards."""
    sharding = {"chunk_shape": [layout.chunk], "codecs": CODECS, "index_codecs": CODECS}
    return {
        "shape": [0],
        "data_type": dtype,
        "chunk_grid": _regular([layout.shard]),
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }


@contextlib.contextmanager
def writing(path: epath.Path) -> Iterator[None]:
    """Raise UserError if the store in `path` cannot be written."""
    try:
        yield
    except Exception as error:  # tensorstore raises ValueError and others
        raise UserError(
            f"{path} cannot be written ({first_line(error)}): make room on its disk or set "
            f"data.store. The same command then resumes after the last whole shard."
        ) from error
