"""Splits documents into train and held-out, and compares the held-out share with the config's."""

import hashlib
from collections.abc import Iterator

import numpy as np

from moe_jax.data.config import DataConfig
from moe_jax.data.corpora import Document, Stream
from moe_jax.data.long_documents import utf8_blocks
from moe_jax.data.store import BYTES, START, Split, Store
from moe_jax.errors import UserError

FAR = 2.0  # a held-out share that differs from the config's by more than this factor is logged


class HeldOutSplitter:
    """Splits the documents of streams into train and heldout; no document is in both.

    If held-out files are set, they are the whole held-out split, and training leaves out every
    document that they contain.  Otherwise the content of a document decides, so copies stay
    together: it is held out if the first 64 bits of its SHA-256, as a fraction, are below
    `fraction`.  A stream with no such document holds out the one with the smallest fraction.

    Attributes:
      left_out: documents of the training files that `split` left out so far.
    """

    def __init__(self, streams: tuple[Stream, ...], fraction: float):
        self.left_out = 0
        self._streams = streams
        self._by_file = any(stream.heldout_files for stream in streams)
        self._limit = 0 if self._by_file else int(fraction * 2**64)
        self._chosen: set[int] = set()
        for stream in streams:
            if self._by_file:
                self._chosen.update(_key(doc.text) for doc in stream.heldout_documents())
            else:
                self._chosen |= self._smallest(stream)
        for stream in streams:
            self._check(stream)

    def split(self, name: str) -> Iterator[Document]:
        """Yield the documents of `train` or `heldout`, stream by stream, in order."""
        for stream in self._streams:
            if self._by_file and name == "heldout":
                yield from stream.heldout_documents()
                continue
            for document in stream.documents():
                if self._is_held(document) == (name == "heldout"):
                    yield document
                elif self._by_file:
                    self.left_out += 1

    def _is_held(self, document: Document) -> bool:
        key = _key(document.text)
        return key < self._limit or key in self._chosen

    def _smallest(self, stream: Stream) -> set[int]:
        """The smallest content hash, to be held out, if no hash is below the limit; else empty."""
        smallest = min((_key(doc.text) for doc in stream.documents()), default=None)
        if smallest is None:
            raise UserError(f"{stream.key}: {stream.name!r} holds no documents: name other files.")
        return {smallest} if smallest >= self._limit else set()

    def _check(self, stream: Stream) -> None:
        """Raise UserError if one of the splits would have no text of the stream."""
        if self._by_file and not any(stream.heldout_documents()):
            raise UserError(
                f"{stream.key}.heldout_files hold no documents: name files with text in them."
            )
        if not all(self._is_held(document) for document in stream.documents()):
            return
        if self._by_file:
            raise UserError(
                f"{stream.key}.heldout_files contain every document of {stream.key}.files: name "
                f"other files to train on."
            )
        raise UserError(
            f"{stream.key}: {stream.name!r} is too small to be split into train and held-out: it "
            f"needs at least two different documents (a single text file has one per 8,192 "
            f"characters). Add text or set {stream.key}.heldout_files."
        )


def _key(text: str) -> int:
    sha = hashlib.sha256()
    for block in utf8_blocks(text):
        sha.update(block)
    return int.from_bytes(sha.digest()[:8], "big")


def share_warnings(store: Store, config: DataConfig) -> list[str]:
    """Make a line for each stream whose share of held-out bytes is far from the config's.

    Documents are held out whole, so with few documents, or a very long one, any share is possible.
    Held-out text that is named by file is not checked.
    """
    if config.heldout_files or any(part.get("heldout_files") for part in config.mixture.values()):
        return []
    asked, lines = config.heldout_fraction, []
    rows = [_stream_bytes(split) for split in (store.train, store.heldout)]
    counts = [_stream_documents(split) for split in (store.train, store.heldout)]
    for i, name in enumerate(store.streams):
        held = rows[1][i] / (rows[0][i] + rows[1][i])
        if asked / FAR <= held <= asked * FAR:
            continue
        where = f"of data.mixture.{name} " if config.mixture else ""
        documents = f"{counts[1][i]:,} of {counts[0][i] + counts[1][i]:,} documents"
        lines.append(
            f"WARNING: {held:.1%} of the bytes {where}are held out, but data.heldout_fraction is "
            f"{asked:.1%}: whole documents are held out, here {documents}.  Use more or shorter "
            f"documents, or set data.heldout_files."
        )
    return lines


def _stream_bytes(split: Split) -> np.ndarray:
    """Bytes of each stream's documents [streams]."""
    place = _stream_of(split)
    return np.bincount(place, split.documents[:, BYTES], minlength=len(split.bounds) - 1)


def _stream_documents(split: Split) -> np.ndarray:
    """Documents of each stream [streams]."""
    return np.bincount(_stream_of(split), minlength=len(split.bounds) - 1)


def _stream_of(split: Split) -> np.ndarray:
    """The stream of each document."""
    return np.searchsorted(split.bounds[:-1], split.documents[:, START], side="right") - 1
