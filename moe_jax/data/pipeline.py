"""Reads the rows of a batch as a pure function of (seed, step, row).

A window is `sequence_length + 1` tokens of a split's stream, beginning at a multiple of
`sequence_length`: every token except a stream's first is a target exactly once per epoch.  The
window of a row follows from the seed and `step * batch_size + row` alone (Grain's random access
shuffle, repeat and mix), never from earlier reads or from the number of hosts.

Axes: B rows that are read, T positions, U = T + 1 tokens of a window.
"""

import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Integer

from moe_jax.data.batch import Batch
from moe_jax.data.store import BYTES, SOURCE, START, Split, Store
from moe_jax.errors import UserError

ENDLESS = 2**53  # rows: more than any run reads
HELDOUT_SEED = 0  # every run evaluates the same windows in the same order


class DataLimit(NamedTuple):
    """Whole batches available under `data.max_epochs`, and the stream that runs out first."""

    steps: int  # whole batches
    stream: int  # index of the stream that runs out first

    def text(self, streams: Sequence[str]) -> str:
        """Name the text that is used up, for a sentence.

        Args:
          streams: entries of the mixture.

        Returns:
          "text of data.mixture.NAME" if there are several streams, else "text".
        """
        return f"text of data.mixture.{streams[self.stream]}" if len(streams) > 1 else "text"


class Windows:
    """The windows of a split, numbered across all its streams.

    Args:
      split: to cut into windows.
      pad_id: token of padding positions.
      sequence_length: T.
      confine: targets and positions stop at document borders.
      bos_tokens: number of control tokens at the start of every document (0 or 1); they have no
        bytes.

    Attributes:
      starts: number of each stream's first window, then the number of windows.
    """

    def __init__(
        self, split: Split, pad_id: int, sequence_length: int, confine: bool, bos_tokens: int = 0
    ):
        self._split = split
        self._pad_id = pad_id
        self._T = sequence_length
        self._confine = confine
        self._bos_tokens = bos_tokens
        lengths = np.diff(split.bounds)
        counts = -(-np.maximum(lengths - 1, 0) // sequence_length)
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        document_starts = split.documents[:, START]
        self._document_starts = np.append(document_starts, split.num_tokens)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def bounds(self, windows: Integer[np.ndarray, "B"]) -> tuple[np.ndarray, np.ndarray]:
        """The first token of each window and the token after its last; equal for window -1."""
        stream = np.searchsorted(self.starts, windows, side="right") - 1
        stream = np.clip(stream, 0, len(self.starts) - 2)
        start = self._split.bounds[stream] + (windows - self.starts[stream]) * self._T
        stop = np.minimum(start + self._T + 1, self._split.bounds[stream + 1])
        empty = windows < 0
        return np.where(empty, 0, start), np.where(empty, 0, stop)

    def batch(self, windows: Integer[np.ndarray, "B"], row_ids: Integer[np.ndarray, "B"]) -> Batch:
        """Read these windows as rows; window -1 is a row of padding.

        Raises:
          UserError: tokens cannot be read.
        """
        B, T = len(windows), self._T
        start_B, stop_B = self.bounds(windows)
        text_BU = np.full((B, T + 1), self._pad_id, np.int32)
        rows = [b for b in range(B) if stop_B[b] > start_B[b]]
        ranges = [(int(start_B[b]), int(stop_B[b])) for b in rows]
        for b, tokens in zip(rows, self._split.read(ranges), strict=True):
            text_BU[b, : len(tokens)] = tokens

        # A stream's last window is short.  Its last token has no target: it is padding as input.
        place_BU = start_B[:, None] + np.arange(T + 1)
        real_BT = place_BU[:, 1:] < stop_B[:, None]
        place_BU = np.minimum(place_BU, np.maximum(stop_B - 1, 0)[:, None])
        document_BU = np.searchsorted(self._document_starts, place_BU, side="right") - 1
        here_BT, next_BT = document_BU[:, :-1], document_BU[:, 1:]
        segments_BT = np.where(real_BT, here_BT - here_BT[:, :1] + 1, 0)
        positions_BT = np.broadcast_to(np.arange(T), (B, T))
        loss_mask_BT = real_BT
        if self._confine:
            began_BT = np.maximum(self._document_starts[here_BT], start_B[:, None])
            positions_BT = np.where(real_BT, place_BU[:, :-1] - began_BT, 0)
            loss_mask_BT = real_BT & (here_BT == next_BT)
        return Batch(
            tokens_BT=np.where(real_BT, text_BU[:, :-1], np.int32(self._pad_id)),
            targets_BT=np.where(real_BT, text_BU[:, 1:], np.int32(self._pad_id)),
            segments_BT=segments_BT.astype(np.int32),
            positions_BT=positions_BT.astype(np.int32),
            loss_mask_BT=loss_mask_BT,
            sources_BT=self._split.documents[next_BT, SOURCE].astype(np.int32),
            bytes_BT=self._bytes(place_BU[:, 1:], next_BT),
            row_B=np.asarray(row_ids, np.int32),
        )

    def _bytes(self, place_BT: np.ndarray, document_BT: np.ndarray) -> np.ndarray:
        """The bytes of the token at each position: its document's, spread evenly over its tokens.

        Sums over whole documents are exact for any tokenizer, and every token of the byte
        tokenizer gets exactly 1.  A bos gets 0.
        """
        first_BT = self._document_starts[document_BT] + self._bos_tokens
        length_BT = self._document_starts[document_BT + 1] - first_BT
        size_BT = self._split.documents[document_BT, BYTES]
        index_BT = place_BT - first_BT
        bytes_BT = (index_BT + 1) * size_BT // length_BT - index_BT * size_BT // length_BT
        return np.where(index_BT < 0, 0, bytes_BT).astype(np.int32)


class Batches:
    """Training rows: `rows(step, row_ids)` for any step, in any order, on any host.

    Args:
      windows: of the training split.
      weights: of its streams in each batch, relative to each other.
      seed: below 2**32; orders the windows.
      batch_size: rows per step, over all hosts.
    """

    def __init__(self, windows: Windows, weights: Sequence[float], seed: int, batch_size: int):
        self.batch_size = batch_size
        self._windows, self._weights = windows, weights
        streams = []
        for i, (start, stop) in enumerate(
            zip(windows.starts[:-1], windows.starts[1:], strict=True)
        ):
            stream_seed = int(np.random.SeedSequence([seed, i]).generate_state(1)[0])
            numbers = grain.MapDataset.range(int(start), int(stop))
            streams.append(numbers.seed(stream_seed).shuffle().repeat())
        self._order = self._mix(streams)

    @classmethod
    def for_training(
        cls, store: Store, seed: int, batch_size: int, sequence_length: int, confine: bool = False
    ) -> "Batches":
        """Make batches of the store's shuffled training windows; each stream repeats without end.

        Args:
          store: an open store; its weights mix the streams.
          seed: below 2**32; orders the windows.
          batch_size: rows per step, over all hosts.
          sequence_length: T, tokens per row.
          confine: targets and positions stop at document borders, as attention then does.

        Returns:
          Batches of NumPy rows, without end.

        Raises:
          UserError: the sequence is longer than the split, or a batch has more rows than there are
            windows.
        """
        windows = Windows(store.train, store.pad_id, sequence_length, confine, len(store.bos_ids))
        _check_length(store.train, sequence_length, "training")
        if len(windows) < batch_size:
            raise UserError(
                f"The training text makes {len(windows)} rows of {sequence_length} tokens, fewer "
                f"than one batch of {batch_size}: add text, or lower train.batch_size or "
                "data.sequence_length."
            )
        if np.any(np.diff(windows.starts) == 0):
            name = store.streams[int(np.argmin(np.diff(windows.starts)))]
            raise UserError(f"data.mixture.{name} has no text to train on: add text or remove it.")
        return cls(windows, store.weights, seed, batch_size)

    @property
    def rows_per_epoch(self) -> int:
        """The number of windows in the training split."""
        return len(self._windows)

    def supply(self, epochs: int) -> DataLimit | None:
        """Compute the steps until a stream would be read more than `epochs` times.

        Args:
          epochs: times that each window may be read; 0: no limit.

        Returns:
          Whole steps and the stream that runs out first; None: no run reaches that step.
        """
        limits = [min(epochs * int(n), ENDLESS) for n in np.diff(self._windows.starts)]
        # Grain's length of a mix comes from a floating-point division, so it only approximates the
        # row at which a stream runs out.  In any prefix, the rows of one of M streams differ from
        # its share by less than M.  The search starts that far before, counted in rows of the mix.
        near = len(self._mix([grain.MapDataset.range(n) for n in limits])) if epochs else ENDLESS
        if near >= ENDLESS:
            return None
        slack = (len(limits) + 1) * math.ceil(sum(self._weights) / min(self._weights)) + 8
        endless = grain.MapDataset.range(sys.maxsize)
        places: Any = self._mix([endless.map(lambda n, i=i: (i, n)) for i in range(len(limits))])
        for row in itertools.count(max(0, near - slack)):
            stream, place = places[row]
            if place >= limits[stream]:
                return DataLimit(row // self.batch_size, stream)
        raise AssertionError("an endless count ends")

    def epochs(self, steps: int) -> list[float]:
        """Compute the epochs of each stream in the first steps: rows read, divided by windows.

        Args:
          steps: number of data steps from the first on.

        Returns:
          One number per stream; 1.5: its text was read one and a half times.
        """
        counts = mixed_counts(steps * self.batch_size, self._weights)
        sizes = np.diff(self._windows.starts).tolist()
        return [count / size for count, size in zip(counts, sizes, strict=True)]

    def _mix(self, streams: Sequence[grain.MapDataset]) -> grain.MapDataset:
        return grain.MapDataset.mix(streams, self._weights)

    def window_ids(self, step: int, row_ids: Integer[np.ndarray, "B"]) -> Integer[np.ndarray, "B"]:
        """The windows in the rows of a step, for audits.

        Args:
          step: counted from 0.
          row_ids: rows of the global batch, 0 to batch_size - 1.

        Returns:
          int64 window numbers [B].
        """
        first = step * self.batch_size
        return np.array([self._order[first + int(row)] for row in row_ids], np.int64)

    def rows(self, step: int, row_ids: Integer[np.ndarray, "B"] | None = None) -> Batch:
        """Read rows of the global batch of a step: a pure function of seed, step and row.

        Args:
          step: counted from 0.
          row_ids: rows to read, 0 to batch_size - 1; None: all of them.

        Returns:
          NumPy arrays [B, T] with B = len(row_ids).

        Raises:
          UserError: tokens cannot be read.
        """
        row_ids = np.arange(self.batch_size) if row_ids is None else row_ids
        return self._windows.batch(self.window_ids(step, row_ids), row_ids)


def mixed_counts(rows: int, weights: Sequence[float]) -> list[int]:
    """Count the rows that Grain's mix takes from each stream among its first `rows` rows.

    Grain scales the weights to whole numbers, the smallest 100.  All streams but the first together
    get their share of the rows, rounded down, and the first gets the rest.  The others' rows are
    divided among them by the same rule.

    Args:
      rows: number of rows from the first on.
      weights: of the streams.
    """
    shares = [int(weight * 100 / min(weights)) for weight in weights]
    counts, left = [], rows
    for i, share in enumerate(shares):
        others = sum(shares[i:])
        rest = left * (others - share) // others
        counts.append(left - rest)
        left = rest
    return counts


class HeldOut:
    """A sample of the held-out windows, each once, in a fixed pseudo-random order; `len()` batches.

    The sample and its order follow from the split, the sequence length and `rows` alone: batches of
    any size, on any number of devices, hold the same rows in the same order.  The last batch is
    filled with rows of padding.
    """

    def __init__(
        self,
        store: Store,
        batch_size: int,
        sequence_length: int,
        confine: bool = False,
        rows: int = 0,
    ):
        """See `Batches.for_training`.

        Args:
          store: an open store.
          batch_size: rows that are evaluated at once.
          sequence_length: T, tokens per row.
          confine: as in training.
          rows: of the sample; 0, or more than the split has: the whole split.

        Raises:
          UserError: the sequence is longer than the held-out split.
        """
        _check_length(store.heldout, sequence_length, "held-out")
        self.batch_size = batch_size
        self._windows = Windows(
            store.heldout, store.pad_id, sequence_length, confine, len(store.bos_ids)
        )
        order = np.random.Generator(np.random.Philox(HELDOUT_SEED)).permutation(len(self._windows))
        self._order = order[: rows or None]

    @property
    def num_rows(self) -> int:
        """The number of rows in the sample, without padding."""
        return len(self._order)

    def __len__(self) -> int:
        return math.ceil(self.num_rows / self.batch_size)

    def rows(self, index: int, row_ids: Integer[np.ndarray, "B"]) -> Batch:
        """Read rows of a batch.

        Args:
          index: of the batch, 0 to len() - 1.
          row_ids: rows to read, 0 to batch_size - 1.

        Returns:
          NumPy arrays [B, T]; `row_B` counts from the first batch on.

        Raises:
          IndexError: there is no such batch.
          UserError: tokens cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"held-out batch {index} of {len(self)}")
        places = index * self.batch_size + np.asarray(row_ids)
        inside = places < len(self._order)
        windows = np.where(inside, self._order[np.where(inside, places, 0)], -1)
        return self._windows.batch(windows, places)


def _check_length(split: Split, sequence_length: int, what: str) -> None:
    if split.num_tokens < sequence_length + 1:
        raise UserError(
            f"The {what} text has {split.num_tokens} tokens, but data.sequence_length "
            f"{sequence_length} needs {sequence_length + 1} or more: lower it or add text."
        )
