"""Rows of uniformly random tokens: what other trainers' benchmarks measure on.

A router that has learnt nothing yet sends equal tokens to equal experts.  Text as bytes holds few
different tokens, so it loads experts unevenly; random ids of the model's whole vocabulary do not.
"""

import numpy as np

from moe_jax.config import Config
from moe_jax.data.batch import Batch
from moe_jax.data.feed import RowsFn


def random_rows(config: Config) -> RowsFn:
    """Rows of one document each, a function of (seed, step, row) like those of a text.

    `config` is resolved.
    """
    T, vocabulary, seed = config.data.sequence_length, config.model.vocab_size, config.seed

    def rows(step: int, row_ids: np.ndarray) -> Batch:
        ids_BU = np.stack(  # U = T + 1
            [
                np.random.default_rng((seed, step, int(row))).integers(
                    vocabulary, size=T + 1, dtype=np.int32
                )
                for row in row_ids
            ]
        )
        one_BT = np.ones((len(row_ids), T), np.int32)
        return Batch(
            tokens_BT=ids_BU[:, :-1],
            targets_BT=ids_BU[:, 1:],
            segments_BT=one_BT,
            positions_BT=np.broadcast_to(np.arange(T, dtype=np.int32), one_BT.shape),
            loss_mask_BT=one_BT.astype(bool),
            sources_BT=0 * one_BT,
            bytes_BT=one_BT,
            row_B=np.asarray(row_ids, np.int32),
        )

    return rows
