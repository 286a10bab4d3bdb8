"""Defines the batch of a step, in the form that every part of a run reads.

Axes: B rows, T positions.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int


class Batch(NamedTuple):
    """Rows of a batch: NumPy arrays from a store, jax.Arrays of the global batch from a feed.

    Where `loss_mask_BT` is False, target, source and bytes are unspecified.
    """

    tokens_BT: Any  # int32 ids, 0 to V - 1
    targets_BT: Any  # int32, the next token
    segments_BT: Any  # int32, 1.. by document within the row; 0 is padding
    positions_BT: Any  # int32, from the row's start; if confined, from the document's
    loss_mask_BT: Any  # bool, the target is a token (if confined, of the same document)
    sources_BT: Any  # int32, source id of the target
    bytes_BT: Any  # int32, the target's even share of its document's UTF-8 bytes (eos counts 1)
    row_B: Any  # int32, row of the global batch


def make_batch(
    tokens: Int[np.ndarray, "*rows T"],
    targets: Int[np.ndarray, "*rows T"],
    segments: Int[np.ndarray, "*rows T"] | None = None,
    row: Int[np.ndarray, "*rows"] | None = None,
) -> Batch:
    """Make a batch of given tokens; every token of a document has a target, one byte long.

    Args:
      tokens, targets: ids [..., T].
      segments: document of each token, 0 for padding; None: each row is one document.
      row: rows of the global batch; None: numbered in order.
    """
    shape = tokens.shape
    segments = np.ones(shape, np.int32) if segments is None else segments
    row = np.arange(tokens[..., 0].size).reshape(shape[:-1]) if row is None else row
    return Batch(
        tokens_BT=tokens.astype(np.int32),
        targets_BT=targets.astype(np.int32),
        segments_BT=segments.astype(np.int32),
        positions_BT=np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape),
        loss_mask_BT=segments > 0,
        sources_BT=np.zeros(shape, np.int32),
        bytes_BT=np.ones(shape, np.int32),
        row_B=row.astype(np.int32),
    )
