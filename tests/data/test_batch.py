"""Compares a batch made of given tokens with one that is read from a store."""

import numpy as np

from moe_jax.data.batch import make_batch
from moe_jax.data.pipeline import Batches


def test_a_made_batch_is_what_a_store_gives(store):
    batches = Batches.for_training(store, seed=0, batch_size=6, sequence_length=16)
    read = batches.rows(2)
    made = make_batch(read.tokens_BT, read.targets_BT, read.segments_BT, read.row_B)
    same = made._replace(sources_BT=read.sources_BT, bytes_BT=read.bytes_BT)
    for name, expected in read._asdict().items():
        found = getattr(same, name)
        assert found.dtype == expected.dtype, name
        np.testing.assert_array_equal(found, expected, err_msg=name)
    assert (made.sources_BT == 0).all() and (made.bytes_BT == 1).all()


def test_padding_is_no_target_and_rows_are_counted_in_order():
    tokens = np.arange(24).reshape(2, 3, 4)
    segments = np.ones((2, 3, 4), np.int32)
    segments[1, 2, 1:] = 0
    batch = make_batch(tokens, tokens + 1, segments)
    np.testing.assert_array_equal(batch.loss_mask_BT, segments > 0)
    np.testing.assert_array_equal(batch.row_B, [[0, 1, 2], [3, 4, 5]])
    assert make_batch(tokens, tokens).segments_BT.min() == 1
