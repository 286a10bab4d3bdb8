"""Makes rows of uniformly random tokens, the data of other trainers' benchmarks.

An untrained router sends equal tokens to equal experts.  Text as bytes has few distinct tokens, so
it loads the experts unevenly; random ids from the model's whole vocabulary load them evenly.
B rows, T tokens in a row, U = T + 1.
"""

import numpy as np

from moe_jax.config import Config
from moe_jax.data.batch import Batch, make_batch
from moe_jax.data.feed import RowsFn


def random_rows(config: Config) -> RowsFn:
    """Make a function of (step, row ids), seeded by `config.seed`; each row is one document.

    `config` is resolved.
    """
    T, vocabulary, seed = config.data.sequence_length, config.model.vocab_size, config.seed

    def rows(step: int, row_ids: np.ndarray) -> Batch:
        ids_BU = np.stack(
            [
                np.random.default_rng((seed, step, int(row))).integers(
                    vocabulary, size=T + 1, dtype=np.int32
                )
                for row in row_ids
            ]
        )
        return make_batch(ids_BU[:, :-1], ids_BU[:, 1:], row=np.asarray(row_ids))

    return rows
