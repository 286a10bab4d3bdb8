"""Checks rows against a plain oracle: a function of (seed, step, row), each window once per epoch.

Axes: B rows, T positions.
"""

import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data.pipeline import Batches, HeldOut, Windows
from moe_jax.data.store import Split
from moe_jax.errors import UserError

PAD = 257
T = 12


def assert_same(batch, expected, rows=slice(None)):
    for name, ours, theirs in zip(batch._fields, batch, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs[rows], err_msg=name)
        assert ours.dtype == theirs.dtype, name


def test_rows_do_not_depend_on_who_asks_or_when(store):
    whole = Batches.for_training(store, seed=3, batch_size=16, sequence_length=T)
    expected = [whole.rows(step, np.arange(16)) for step in range(5)]
    other = Batches.for_training(store, seed=3, batch_size=16, sequence_length=T)
    for step in (4, 0, 2):
        for rows in (np.arange(8), np.arange(8, 16), np.array([5, 15, 0, 7])):
            assert_same(other.rows(step, rows), expected[step], rows)


def test_every_window_once_an_epoch_across_restarts(store):
    batch_size, epochs = 7, 3
    one = Batches.for_training(store, 0, batch_size, T)
    per_epoch = one.rows_per_epoch
    seen = []
    for step in range(-(-epochs * per_epoch // batch_size)):
        if step % 5 == 0:  # a restart keeps only the step
            one = Batches.for_training(store, 0, batch_size, T)
        seen += one.window_ids(step, np.arange(batch_size)).tolist()
    orders = [seen[e * per_epoch : (e + 1) * per_epoch] for e in range(epochs)]
    for order in orders:
        assert sorted(order) == list(range(per_epoch))
    assert orders[0] != orders[1] != orders[2]


def test_an_epoch_holds_every_token_as_a_target_once(store):
    batches = Batches.for_training(store, 0, 1, T)
    targets = Counter()
    for step in range(batches.rows_per_epoch):
        row = batches.rows(step, np.arange(1))
        targets.update(row.targets_BT[row.loss_mask_BT].tolist())
    (tokens,) = store.train.read([(0, store.train.num_tokens)])
    assert targets == Counter(tokens[1:].tolist())


def test_two_seeds_order_rows_differently(store):
    first, second = (
        Batches.for_training(store, seed, 16, T).window_ids(0, np.arange(16)) for seed in (0, 1)
    )
    assert first.tolist() != second.tolist()


def test_streams_mix_by_weight_and_never_share_a_row(make_store):
    texts = {name: [f"{name * 30}{i}" for i in range(20)] for name in "ab"}
    store = make_store(weights={"a": 3.0, "b": 1.0}, **texts)
    batches = Batches.for_training(store, 0, 8, T)
    counts = Counter()
    for step in range(50):
        row = batches.rows(step, np.arange(8))
        for sources, mask in zip(row.sources_BT, row.loss_mask_BT, strict=True):
            (source,) = set(sources[mask].tolist())
            counts[store.sources[source]] += 1
    assert counts == {"a": 300, "b": 100}


def supply_by_counting(batches, counts, epochs):
    """Find (steps, stream) by reading the order from its beginning."""
    stream_of = np.repeat(np.arange(len(counts)), counts)
    given = Counter()
    for step in itertools.count():
        for window in batches.window_ids(step, np.arange(batches.batch_size)):
            stream = int(stream_of[window])
            given[stream] += 1
            if given[stream] > epochs * counts[stream]:
                return step, stream


@pytest.mark.parametrize(
    ("counts", "weights", "batch_size"),
    [
        ([60], [1.0], 7),
        ([60], [1.0], 12),  # whole batches
        ([5, 50], [1.0, 9.0], 4),
        ([7, 31, 3], [0.3, 0.5, 0.17], 5),
        ([40, 2, 11, 1], [3.1, 0.01, 1.0, 0.07], 3),
    ],
)
def test_supply_is_what_counting_finds(counts, weights, batch_size):
    windows = SimpleNamespace(starts=np.cumsum([0, *counts]))
    batches = Batches(windows, weights, 3, batch_size)
    for epochs in (1, 2, 5):
        expected = supply_by_counting(batches, counts, epochs)
        assert batches.supply(epochs) == expected
    assert batches.supply(0) is None and batches.supply(2**52) is None


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0.01, 10)), min_size=1, max_size=6),
    st.integers(1, 9),
    st.integers(1, 4),
)
@pytest.mark.full
def test_supply_of_any_mixture(streams, batch_size, epochs):
    counts, weights = zip(*streams, strict=True)
    windows = SimpleNamespace(starts=np.cumsum([0, *counts]))
    batches = Batches(windows, weights, 0, batch_size)
    assert batches.supply(epochs) == supply_by_counting(batches, counts, epochs)


def test_held_out_covers_every_window_once_then_pads(store):
    held = HeldOut(store, 7, T)
    windows = -(-(store.heldout.num_tokens - 1) // T)
    assert len(held) == -(-windows // 7) and windows % 7
    targets, full_rows = Counter(), 0
    for index in range(len(held)):
        batch = held.rows(index, np.arange(7))
        assert_same(held.rows(index, np.array([6, 1])), batch, np.array([6, 1]))
        targets.update(batch.targets_BT[batch.loss_mask_BT].tolist())
        full_rows += int(batch.loss_mask_BT.any(axis=1).sum())
    (tokens,) = store.heldout.read([(0, store.heldout.num_tokens)])
    assert targets == Counter(tokens[1:].tolist()) and full_rows == windows
    empty = batch.segments_BT[windows % 7 :]
    assert empty.size and not empty.any() and (batch.tokens_BT[windows % 7 :] == PAD).all()
    with pytest.raises(IndexError):
        held.rows(len(held), np.arange(7))


def test_bytes_of_the_byte_tokenizer_are_ones(store):
    batch = HeldOut(store, 4, T).rows(0, np.arange(4))
    assert (batch.bytes_BT[batch.loss_mask_BT] == 1).all()


def test_a_corpus_smaller_than_a_batch_or_a_row_is_refused(store):
    windows = -(-(store.train.num_tokens - 1) // T)
    Batches.for_training(store, 0, windows, T)
    with pytest.raises(UserError, match=f"makes {windows} rows of 12 tokens, fewer than one batch"):
        Batches.for_training(store, 0, windows + 1, T)
    tokens = store.train.num_tokens
    Batches.for_training(store, 0, 1, tokens - 1)
    with pytest.raises(UserError, match=f"training text has {tokens} tokens"):
        Batches.for_training(store, 0, 1, tokens)
    with pytest.raises(UserError, match="held-out text has"):
        HeldOut(store, 4, store.heldout.num_tokens)


def plain_rows(streams, T, confine):
    """Make the rows of every window, token by token; documents are (ids, bytes, source)."""
    rows, document = [], 0
    for documents in streams:
        flat = []  # (id, bytes, source, document, position in the document)
        for ids, size, source in documents:
            for i, token in enumerate(ids):
                share = (i + 1) * size // len(ids) - i * size // len(ids)
                flat.append((token, share, source, document, i))
            document += 1
        for start in range(0, len(flat) - 1, T):
            row = []
            for t in range(T):
                if start + t + 1 >= len(flat):
                    row.append((PAD, PAD, 0, 0 if confine else t, False, None, None))
                    continue
                here, after = flat[start + t], flat[start + t + 1]
                segment = here[3] - flat[start][3] + 1
                position = min(t, here[4]) if confine else t
                scored = not confine or here[3] == after[3]
                row.append((here[0], after[0], segment, position, scored, after[2], after[1]))
            rows.append(row)
    return rows


documents_strategy = st.lists(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 255), min_size=1, max_size=9),
            st.integers(1, 30),
            st.integers(0, 3),
        ),
        min_size=1,
        max_size=5,
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=150, deadline=None)
@given(streams=documents_strategy, T=st.integers(1, 11), confine=st.booleans())
def test_windows_equal_the_plain_oracle(streams, T, confine):
    tokens, table, bounds = [], [], [0]
    for documents in streams:
        for ids, size, source in documents:
            table.append((len(tokens), size, source))
            tokens += ids
        bounds.append(len(tokens))
    split = Split(
        "memory", ts.array(np.array(tokens, np.uint16)), np.array(table), np.array(bounds), 256
    )
    windows = Windows(split, PAD, T, confine)
    expected = plain_rows(streams, T, confine)
    assert len(windows) == len(expected)
    numbers = np.array([*range(len(windows)), -1])
    batch = windows.batch(numbers, numbers)
    for b, row in enumerate(expected):
        for t, (token, target, segment, position, scored, source, size) in enumerate(row):
            got = [field[b, t].item() for field in batch[:5]]
            assert got == [token, target, segment, position, scored], (b, t)
            if scored:
                assert (batch.sources_BT[b, t], batch.bytes_BT[b, t]) == (source, size)
    assert (batch.tokens_BT[-1] == PAD).all() and not batch.loss_mask_BT[-1].any()
    assert not batch.segments_BT[-1].any()


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 3.0, "b": 1.0, "c": 0.37}])
def test_epochs_count_the_rows_that_were_read(make_store, weights):
    texts = {name: [f"{name}{i} " * 30 for i in range(4)] for name in weights}
    store = make_store(weights, **texts)
    batches = Batches.for_training(store, 1, 5, T)
    starts = np.cumsum([0, *(-(-(n - 1) // T) for n in np.diff(store.train.bounds))])
    read = np.zeros(len(weights))
    for step in range(60):
        sizes = np.diff(starts)
        np.testing.assert_allclose(batches.epochs(step), read / sizes)
        ids = batches.window_ids(step, np.arange(5))
        read += np.histogram(ids, starts)[0]
    assert batches.epochs(60)[0] > 1.5
