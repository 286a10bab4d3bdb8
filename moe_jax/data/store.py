"""Opens the tokenised corpus on disk: text is tokenised once, and any row can be read at random.

    ROOT/FINGERPRINT[:16]/manifest.json          written last: a store without it is not finished;
                                                 SHA-256 of itself and of both arrays' zarr.json
                         /train/tokens           zarr3, one flat token stream
                         /train/documents        zarr3 [documents, 3]: first token, bytes, source
                         /heldout/...

Tokens are cut into rows only when they are read, so the sequence length is chosen at training
time.  The entries of a mixture follow each other in the stream.  An eos token ends every
document and, under data.begin_with_bos, a bos token begins it.  `build_store` (build.py) writes
stores; this file opens them.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import tensorstore as ts
from etils import epath
from jaxtyping import Integer

from moe_jax.errors import UserError
from moe_jax.files import json_files, records, seals

STORE_FORMAT = 3  # raised whenever the same text would be stored differently
SPLITS = ("train", "heldout")
MANIFEST = "manifest.json"
CACHE_BYTES = 256 << 20  # decoded chunks kept in memory, all arrays together
START, BYTES, SOURCE = range(3)  # columns of a documents array
# Of every chunk.  No compression, so an untrusted store cannot declare more than its disk holds.
CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


@dataclasses.dataclass(frozen=True)
class Split:
    """One token stream of a store."""

    path: str  # its folder, local or gs://
    tokens: ts.TensorStore  # uint16 or uint32 ids, read on demand
    # First token of each document, its UTF-8 bytes (plus one for its eos) and its source id: held
    # in memory, 24 bytes per document.
    documents: Integer[np.ndarray, "N 3"]
    bounds: Integer[np.ndarray, "M"]  # first token of each entry of the mixture, then the length
    vocab_size: int  # V of the tokenizer: every id is below it

    @property
    def num_tokens(self) -> int:
        """The number of tokens in the split, eos included."""
        return int(self.bounds[-1])

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Read tokens [start, stop) of each range, concurrently.

        Args:
          ranges: pairs of start and stop, in tokens.

        Returns:
          The ids of each range.

        Raises:
          UserError: a chunk is missing or does not match its checksum, or the tokenizer does not
            have a token id.
        """
        futures = [self.tokens[start:stop].read() for start, stop in ranges]
        rows = []
        for (start, stop), future in zip(ranges, futures, strict=True):
            try:
                rows.append(future.result())
            except Exception as error:  # tensorstore raises ValueError and others
                what = f"{self.path}: tokens {start} to {stop} cannot be read ({first_line(error)})"
                raise damaged_error(what, os.path.dirname(self.path)) from error
            if len(rows[-1]) and rows[-1].max() >= self.vocab_size:
                place = start + int(rows[-1].argmax())
                what = f"{self.path}: token {place} has id {rows[-1].max()}"
                raise damaged_error(
                    f"{what}, beyond its vocabulary of {self.vocab_size}",
                    os.path.dirname(self.path),
                )
        return rows


@dataclasses.dataclass(frozen=True)
class Store:
    """A finished store, open for reading."""

    path: str  # its folder, local or gs://
    fingerprint: str  # SHA-256 over names, contents, tokenizer, split and format
    earlier: tuple[str, ...]  # fingerprints that earlier formats gave to the same tokens
    content: str  # as `fingerprint`, without the names of files; empty: opened by its path alone
    tokenizer: str  # identity of the tokenizer
    vocab_size: int  # V of the tokenizer
    bos_ids: tuple[int, ...]  # ids that begin every document: the bos token or none
    eos_id: int  # token that ends every document
    pad_id: int  # token of padding positions
    streams: tuple[str, ...]  # entries of the mixture, in order of their tokens
    weights: tuple[float, ...]  # of the streams in training; from the config, not from the disk
    sources: tuple[str, ...]  # labels by source id
    train: Split  # tokens to train on
    heldout: Split  # tokens to evaluate on

    def same_text(self, fingerprint: object) -> bool:
        """True if `fingerprint` belongs to a store with the same tokens.

        Args:
          fingerprint: as a run has recorded it.

        Returns:
          True also for a fingerprint that an earlier format gave to these tokens.
        """
        return fingerprint in (self.fingerprint, *self.earlier)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check that a model has a row for every token of the store.

        Args:
          vocab_size: V of the model.

        Raises:
          UserError: V is smaller than that of the tokenizer.
        """
        if self.vocab_size > vocab_size:
            raise UserError(
                f"model.vocab_size is {vocab_size} but the tokenizer's ids reach "
                f"{self.vocab_size - 1}: set it to {self.vocab_size}, or 0 for the tokenizer's."
            )


def key_value_store(path: str | os.PathLike) -> ts.KvStore:
    """Open the folder `path` (local or gs://); writes of whole keys are atomic and durable."""
    return ts.KvStore.open(_location(path)).result()


def array_spec(path: str | os.PathLike) -> dict[str, Any]:
    """The TensorStore spec of a zarr3 array whose missing chunks are errors.

    By default TensorStore does not store a chunk that equals the fill value and reads a missing
    chunk as the fill value, so a deleted file would read as zeros.
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


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """The bytes of a manifest file: JSON, with the SHA-256 of all its other values."""
    return json.dumps(seals.sealed(manifest), indent=1).encode()


def array_digests(folder: ts.KvStore) -> dict[str, str]:
    """SHA-256 of the files that describe the arrays' layout; tokens have their own checksums."""
    names = [f"{split}/{array}/zarr.json" for split in SPLITS for array in ("tokens", "documents")]
    return {name: hashlib.sha256(folder.read(name).result().value).hexdigest() for name in names}


def damaged_error(what: str, store: os.PathLike[str] | str) -> UserError:
    """Make the error for a store that differs from what was written."""
    return UserError(f"{what}: delete {os.fspath(store)}, and the next run builds it again.")


def read_manifest(path: str | os.PathLike) -> dict[str, Any] | None:
    """Read the manifest of the store at `path`; None: there is no finished store.

    Raises:
      UserError: the manifest is damaged or of another format.
    """
    name = f"{os.fspath(path)}/{MANIFEST}"
    try:
        raw = key_value_store(path).read(MANIFEST).result()
        manifest = json_files.parse(raw.value) if raw.state == "value" else None
    except Exception as error:  # tensorstore raises ValueError and others
        raise damaged_error(f"{name} cannot be read ({first_line(error)})", path) from None
    if manifest is None:
        return None
    if not isinstance(manifest, dict):
        raise damaged_error(f"{name} is not a JSON object", path)
    if manifest.get("format") != STORE_FORMAT:
        what = f"{name} has store format {manifest.get('format')!r} instead of {STORE_FORMAT}"
        raise damaged_error(what, path)
    if manifest.get(seals.SEAL) != seals.seal_of(manifest):
        raise damaged_error(f"{name} differs from what was written (SHA-256)", path)
    wrong = _wrong_key(manifest)
    if wrong:
        raise damaged_error(f"{name} has no usable {wrong!r}", path)
    return manifest


def _wrong_key(manifest: dict[str, Any]) -> str | None:
    """The first key whose value build.py would not write; checked because seals can be forged."""

    def token_id(value: Any) -> int:
        return records.count(value, manifest["vocab_size"])

    def bounds(value: Any) -> None:
        places = [records.count(place, 2**48) for place in records.items(value)]
        right = len(places) == len(manifest["streams"]) + 1 and places[0] == 0
        if not right or places != sorted(places):
            raise ValueError("they do not bound the streams")

    def splits(value: Any) -> None:
        for name in SPLITS:
            bounds(records.mapping(value).get(name))

    checks: dict[str, Callable[[Any], object]] = {
        "fingerprint": records.text,
        "tokenizer": records.text,
        "vocab_size": partial(records.count, limit=2**31),
        "streams": records.names,
        "sources": records.names,
        "arrays": records.mapping,
        "bos_ids": lambda value: [token_id(one) for one in records.items(value)],
        "eos_id": token_id,
        "pad_id": token_id,
        "splits": splits,
    }
    for key, check in checks.items():
        try:
            check(manifest.get(key))
        except ValueError:
            return key
    return None


def open_store(
    path: str | os.PathLike,
    weights: Sequence[float] = (),
    earlier: tuple[str, ...] = (),
    content: str = "",
) -> Store:
    """Open a finished store.

    Args:
      path: folder of the store, local or gs://.
      weights: of the streams in training; empty: 1 each.
      earlier: fingerprints of earlier formats, for `Store.same_text`.
      content: `Store.content`.

    Raises:
      UserError: there is no finished store, or it is damaged or of another format.
    """
    manifest = read_manifest(path)
    if manifest is None:
        raise UserError(f"{os.fspath(path)} holds no finished store: build it first.")
    context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
    try:
        for name, digest in array_digests(key_value_store(path)).items():
            if manifest["arrays"].get(name) != digest:
                raise damaged_error(f"{os.fspath(path)}/{name} differs from what was written", path)
        splits = {name: _open_split(epath.Path(path) / name, manifest, context) for name in SPLITS}
    except UserError:
        raise
    except Exception as error:  # tensorstore raises ValueError and others
        raise damaged_error(
            f"{os.fspath(path)} cannot be read ({first_line(error)})", path
        ) from error
    return Store(
        path=os.fspath(path),
        fingerprint=manifest["fingerprint"],
        earlier=earlier,
        content=content,
        tokenizer=manifest["tokenizer"],
        vocab_size=manifest["vocab_size"],
        bos_ids=tuple(manifest["bos_ids"]),
        eos_id=manifest["eos_id"],
        pad_id=manifest["pad_id"],
        streams=tuple(manifest["streams"]),
        weights=tuple(weights) or (1.0,) * len(manifest["streams"]),
        sources=tuple(manifest["sources"]),
        **splits,
    )


def _open_split(path: epath.Path, manifest: dict[str, Any], context: ts.Context) -> Split:
    """Open one split; raises TensorStore's errors, and UserError if its parts do not fit."""
    bounds = np.asarray(manifest["splits"][path.name], np.int64)
    total, sources = int(bounds[-1]), len(manifest["sources"])
    tokens = ts.open(array_spec(path / "tokens"), context=context, read=True).result()
    if tokens.dtype.name not in ("uint16", "uint32") or tokens.shape != (total,):
        what = f"{path}/tokens holds {tokens.dtype.name}{list(tokens.shape)}"
        raise damaged_error(f"{what} instead of uint16 or uint32 [{total}]", path.parent)
    table = ts.open(array_spec(path / "documents"), read=True).result()
    for name, array in (("tokens", tokens), ("documents", table)):
        if _codecs(array) != [codec["name"] for codec in CODECS]:
            what = f"{path}/{name} has codecs {', '.join(_codecs(array))}"
            raise damaged_error(f"{what}, which no store has", path.parent)
    if table.dtype.name != "int64" or table.shape[1:] != (3,) or table.shape[0] > total:
        what = f"{path}/documents holds {table.dtype.name}{list(table.shape)}"
        raise damaged_error(f"{what} instead of int64 [at most {total}, 3]", path.parent)
    documents = cast(np.ndarray, table.read().result())
    starts = np.append(documents[:, START], total)
    known = (documents[:, SOURCE] >= 0) & (documents[:, SOURCE] < sources)
    if starts[0] != 0 or (np.diff(starts) <= 0).any() or not known.all():
        raise damaged_error(f"{path}/documents does not fit its tokens and sources", path.parent)
    return Split(os.fspath(path), tokens, documents, bounds, manifest["vocab_size"])


def _codecs(array: ts.TensorStore) -> list[str]:
    """The names of the codecs of an array's chunks; with shards, of the chunks inside."""
    codecs = array.spec().to_json()["metadata"]["codecs"]
    if codecs[0]["name"] == "sharding_indexed":
        codecs = codecs[0]["configuration"]["codecs"]
    return [codec["name"] for codec in codecs]


def first_line(error: BaseException) -> str:
    """The first line of an error, without the library's notes on its own source location."""
    return str(error).splitlines()[0].split(" [")[0].rstrip(".") if str(error) else repr(error)
