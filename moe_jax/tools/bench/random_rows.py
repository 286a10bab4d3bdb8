"""Rows of uniformly random tokens: what other trainers' benchmarks measure on.

A router that has learnt nothing yet sends equal tokens to equal experts.  Text as bytes holds few
different tokens, so it loads experts unevenly; random ids of the model's whole vocabulary do not.
"""

import numpy as np

from moe_jax.config import Config
from moe_jax.data.batch import Batch, make_batch
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
        return make_batch(ids_BU[:, :-1], ids_BU[:, 1:], row=np.asarray(row_ids))

    return rows
