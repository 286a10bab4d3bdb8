"""The rows of one step, as every part of a run reads them.  Axes: B rows, T positions."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """Some rows of a batch; NumPy arrays here, jax.Arrays of the global batch from a feed.

    Where `loss_mask_BT` is False, target, source and bytes say nothing.
    """

    tokens_BT: Any  # int32
    targets_BT: Any  # int32, the next token
    segments_BT: Any  # int32, 1.. by document within the row; 0 is padding
    positions_BT: Any  # int32, from the row's start, or the document's when confined
    loss_mask_BT: Any  # bool, the target is a token (and, when confined, of the same document)
    sources_BT: Any  # int32, source id of the target
    bytes_BT: Any  # int32, the target's even share of its document's UTF-8 bytes (eos counts 1)
    row_B: Any  # int32, row of the global batch
