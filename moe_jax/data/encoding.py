"""Encodes documents on all cores, in order.

Threads suffice, because the tokenizer libraries release Python's lock while they encode.
"""

import contextlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from moe_jax.data.corpora import Document
from moe_jax.data.long_documents import encoding_pieces
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import UserError

BATCH_CHARACTERS = 1 << 18  # characters that one thread encodes at once
# The tokenizer library's own threads are disabled: combined with our threads they use 23% more CPU
# time (tokenizers 0.23).
_OWN_THREADS = "TOKENIZERS_PARALLELISM"


class Encoded(NamedTuple):
    """A part of the tokens of a document."""

    document: Document
    ids: np.ndarray  # of any integer type
    first: bool  # the document begins with it
    last: bool  # the document ends with it


class _Piece(NamedTuple):
    document: Document
    text: str
    first: bool
    last: bool


def cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS has none
        return os.cpu_count() or 1


def encode_documents(
    documents: Iterator[Document], tokenizer: Tokenizer, threads: int
) -> Iterator[Encoded]:
    """Yield the tokens of documents, in an order that does not depend on the number of threads.

    Args:
      documents: read by the calling thread.
      tokenizer: encodes their text; bos and eos are not added.
      threads: number of encoding threads; up to 2 * threads batches of text are in memory.

    Raises:
      UserError: the tokenizer fails on a text, or gives ids beyond its vocabulary.
    """
    waiting: deque[Future[list[Encoded]]] = deque()
    with _one_thread_per_call():
        pool = ThreadPoolExecutor(threads, "encode")
        try:
            for batch in _batches(documents, tokenizer):
                waiting.append(pool.submit(_encode, batch, tokenizer))
                if len(waiting) >= 2 * threads:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:  # also if the caller stops reading
            pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _one_thread_per_call() -> Iterator[None]:
    before = os.environ.get(_OWN_THREADS)
    os.environ[_OWN_THREADS] = "false"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_OWN_THREADS, None)
        else:
            os.environ[_OWN_THREADS] = before


def _batches(documents: Iterator[Document], tokenizer: Tokenizer) -> Iterator[list[_Piece]]:
    batch, size = [], 0
    for document in documents:
        place = 0
        for text in encoding_pieces(document.text, tokenizer.cut):
            last = place + len(text) == len(document.text)
            batch.append(_Piece(document, text, place == 0, last))
            place += len(text)
            size += len(text)
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _encode(batch: list[_Piece], tokenizer: Tokenizer) -> list[Encoded]:
    try:
        rows = tokenizer.encode_batch([piece.text for piece in batch])
    except UserError as error:
        names = f"{batch[0].document.name} to {batch[-1].document.name}"
        raise UserError(f"{names}: {error}") from None
    for piece, ids in zip(batch, rows, strict=True):
        if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
            raise UserError(
                f"{piece.document.name}: the tokenizer gives ids {ids.min()} to {ids.max()}, but "
                f"its vocabulary has {tokenizer.vocab_size}. Use one with a complete vocabulary."
            )
    return [
        Encoded(piece.document, ids, piece.first, piece.last)
        for piece, ids in zip(batch, rows, strict=True)
    ]
