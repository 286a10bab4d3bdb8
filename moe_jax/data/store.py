"""The tokenised corpus on disk: text is tokenised once, and any row of it can be read at random.

    ROOT/FINGERPRINT[:16]/manifest.json          written last: a store without it is not finished
                         /train/tokens           zarr3, one flat token stream
                         /train/documents        zarr3 [documents, 3]: first token, bytes, source
                         /heldout/...

Tokens are cut into rows only when they are read, so the sequence length is chosen at training
time.  The entries of a mixture lie one after the other in the stream.  An eos token ends every
document.  `build` (build.py) writes stores; this file opens them.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import tensorstore as ts
from etils import epath
from jaxtyping import Integer

from moe_jax.errors import UserError

STORE_FORMAT = 1  # raised whenever the same text would be stored differently
SPLITS = ("train", "heldout")
CACHE_BYTES = 256 << 20  # decoded chunks kept in memory, all arrays together
START, BYTES, SOURCE = range(3)  # columns of a documents array


@dataclasses.dataclass(frozen=True)
class Split:
    """One token stream of a store.

    `documents` [documents, 3] is held in memory (24 bytes a document): the document's first
    token, its UTF-8 bytes (one more for its eos) and its source id.
    """

    path: str
    tokens: ts.TensorStore
    documents: Integer[np.ndarray, "N 3"]
    bounds: Integer[np.ndarray, "M"]  # first token of each entry of the mixture, then the length

    @property
    def num_tokens(self) -> int:
        """Tokens in the split, eos included."""
        return int(self.bounds[-1])

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Tokens [start, stop) of each range, read concurrently.

        Raises:
          UserError: a chunk that is missing or does not match its checksum.
        """
        futures = [self.tokens[start:stop].read() for start, stop in ranges]
        rows = []
        for (start, stop), future in zip(ranges, futures, strict=True):
            try:
                rows.append(future.result())
            except Exception as error:  # tensorstore raises ValueError and others
                raise UserError(
                    f"{self.path}: tokens {start} to {stop} cannot be read ({first_line(error)}): "
                    "delete this store, and the next run builds it again."
                ) from error
        return rows


@dataclasses.dataclass(frozen=True)
class Store:
    """A finished store, open for reading."""

    path: str
    fingerprint: str  # SHA-256 over names, contents, tokenizer, split and format
    tokenizer: str  # identity of the tokenizer
    vocab_size: int  # V
    eos_id: int
    pad_id: int
    streams: tuple[str, ...]  # entries of the mixture, in order of their tokens
    weights: tuple[float, ...]  # of the streams in training; from the config, not from the disk
    sources: tuple[str, ...]  # labels by source id
    train: Split
    heldout: Split

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises UserError when a model with `vocab_size` ids has no row for some token here."""
        if self.vocab_size > vocab_size:
            raise UserError(
                f"model.vocab_size is {vocab_size} but the tokenizer's ids reach "
                f"{self.vocab_size - 1}: set it to {self.vocab_size}, or 0 for the tokenizer's."
            )


def key_value_store(path: str | os.PathLike) -> ts.KvStore:
    """The folder `path` (local or gs://): atomic, durable writes of whole keys."""
    return ts.KvStore.open(_location(path)).result()


def array_spec(path: str | os.PathLike) -> dict[str, Any]:
    """TensorStore spec of a zarr3 array whose missing chunks are errors.

    By default TensorStore neither stores a chunk that equals the fill value nor minds a chunk
    that is missing, so a deleted file would read as zeros.
    """
    return {
        "driver": "zarr3",
        "kvstore": _location(path),
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
        "recheck_cached_data": "open",  # finished stores never change
    }


def _location(path: str | os.PathLike) -> dict[str, Any]:
    path = os.fspath(path)
    if path.startswith("gs://"):
        bucket, _, folder = path.removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": folder.rstrip("/") + "/"}
    return {"driver": "file", "path": os.path.abspath(path) + "/"}


def read_manifest(path: str | os.PathLike) -> dict[str, Any] | None:
    """The manifest of the store at `path`, or None when there is no finished store."""
    raw = key_value_store(path).read("manifest.json").result()
    return json.loads(raw.value) if raw.state == "value" else None


def open_store(path: str | os.PathLike, weights: Sequence[float] = ()) -> Store:
    """Open a finished store; `weights` of its streams default to 1 each.

    Raises:
      UserError: nothing there, another format, or damage.
    """
    manifest = read_manifest(path)
    if manifest is None:
        raise UserError(f"{os.fspath(path)} holds no finished store: build it first.")
    if manifest["format"] != STORE_FORMAT:
        raise UserError(
            f"{os.fspath(path)} has store format {manifest['format']}, this version reads "
            f"{STORE_FORMAT}: delete it, and the next run builds it again."
        )
    context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
    splits = {
        name: _open_split(epath.Path(path) / name, manifest["splits"][name], context)
        for name in SPLITS
    }
    return Store(
        path=os.fspath(path),
        fingerprint=manifest["fingerprint"],
        tokenizer=manifest["tokenizer"],
        vocab_size=manifest["vocab_size"],
        eos_id=manifest["eos_id"],
        pad_id=manifest["pad_id"],
        streams=tuple(manifest["streams"]),
        weights=tuple(weights) or (1.0,) * len(manifest["streams"]),
        sources=tuple(manifest["sources"]),
        **splits,
    )


def _open_split(path: epath.Path, bounds: list[int], context: ts.Context) -> Split:
    try:
        tokens = ts.open(array_spec(path / "tokens"), context=context, read=True).result()
        documents_array = ts.open(array_spec(path / "documents"), read=True).result()
        documents = cast(np.ndarray, documents_array.read().result())
    except Exception as error:  # tensorstore raises ValueError and others
        raise UserError(
            f"{path} cannot be read ({first_line(error)}): delete this store, and the next run "
            "builds it again."
        ) from error
    return Split(os.fspath(path), tokens, documents, np.asarray(bounds, np.int64))


def first_line(error: BaseException) -> str:
    """What an error says, without the library's notes on where in its source it was raised."""
    return str(error).splitlines()[0].split(" [")[0].rstrip(".") if str(error) else repr(error)
