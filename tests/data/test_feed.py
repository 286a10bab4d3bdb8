"""Checks the feed: global arrays in order, only the host's own rows, errors and waits passed on."""

import threading
import traceback
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.data import feed as feed_module
from moe_jax.data.batch import Batch
from moe_jax.data.feed import DeviceFeed, _Assembler
from moe_jax.data.pipeline import Batches

SHAPE = (2, 8, 12)


@pytest.fixture
def shardings(mesh_of):
    mesh = mesh_of(data=4, expert=2)
    axes = ("data", "fsdp", "expert")
    return NamedSharding(mesh, P(None, axes)), NamedSharding(mesh, P(None, axes))


def numbered(step, row_ids):
    """Make rows that hold their step and number."""
    rows = (1000 * step + 10 * np.asarray(row_ids, np.int32))[:, None] + np.arange(12)
    return Batch(*[rows.astype(np.int32)] * 7, row_B=np.asarray(row_ids, np.int32))


def test_batches_come_in_order_as_global_arrays(store, shardings):
    batches = Batches.for_training(store, 0, 16, 12)
    with DeviceFeed(batches.rows, SHAPE, shardings, start=3, stop=7) as feed:
        found = list(feed)
    assert [step for step, _ in found] == [3, 4, 5, 6]
    for step, batch in found:
        expected = batches.rows(step, np.arange(16))
        for array, rows in zip(batch, expected, strict=True):
            assert isinstance(array, jax.Array) and array.dtype == rows.dtype
            np.testing.assert_array_equal(array, rows.reshape(2, 8, *rows.shape[1:]))
        assert batch.tokens_BT.sharding.is_equivalent_to(shardings[0], 3)
        assert batch.row_B.sharding.is_equivalent_to(shardings[1], 2)


def test_positions_may_be_split_too(mesh_of):
    mesh = mesh_of(data=2, tensor=4)
    split = NamedSharding(mesh, P(None, "data", "tensor")), NamedSharding(mesh, P(None, "data"))
    with DeviceFeed(numbered, SHAPE, split, 0, 1) as feed:
        ((_, batch),) = feed
    np.testing.assert_array_equal(batch.tokens_BT, numbered(0, np.arange(16))[0].reshape(SHAPE))


def test_a_host_reads_only_its_rows_each_once():
    """The stand-in sharding gives this host rows 2..3 and 6..7 of each microbatch."""

    class Here:
        def addressable_devices_indices_map(self, shape):
            return {
                d: (slice(None), slice(*rows), *[slice(None)] * (len(shape) - 2))
                for d, rows in enumerate([(2, 4), (6, 8), (2, 4)])
            }

    asked = []

    def rows_fn(step, row_ids):
        asked.append(row_ids.tolist())
        raise StopIteration

    assemble = _Assembler(rows_fn, SHAPE, (Here(), Here()))  # pyright: ignore
    with pytest.raises(StopIteration):
        assemble.read(0)
    assert asked == [[2, 3, 6, 7, 10, 11, 14, 15]]


def test_an_error_reaches_the_consumer_with_its_traceback(shardings):
    def failing_reader(step, row_ids):
        if step == 2:
            raise ValueError("record 17 is broken")
        return numbered(step, row_ids)

    with DeviceFeed(failing_reader, SHAPE, shardings, 0, 9) as feed:
        assert [next(feed)[0], next(feed)[0]] == [0, 1]
        for _ in range(2):  # asking again repeats the error instead of hanging
            with pytest.raises(ValueError, match="record 17") as error:
                next(feed)
            names = [frame.name for frame in traceback.extract_tb(error.value.__traceback__)]
            assert "failing_reader" in names


def test_no_more_than_depth_batches_are_made_ahead(shardings, monkeypatch):
    made, blocked = [], threading.Event()

    class Watched(threading.Semaphore):
        def acquire(self, *args):
            if self._value == 0:
                blocked.set()
            return super().acquire(*args)

    def rows_fn(step, row_ids):
        made.append(step)
        return numbered(step, row_ids)

    monkeypatch.setattr(feed_module.threading, "Semaphore", Watched)
    with DeviceFeed(rows_fn, SHAPE, shardings, 0, depth=3) as feed:
        assert blocked.wait(60)
        assert made == [0, 1, 2]
        assert next(feed)[0] == 0


def test_close_ends_the_thread_and_the_iteration(shardings):
    feed = DeviceFeed(numbered, SHAPE, shardings, 0)
    next(feed)
    feed.close()
    assert not feed._thread.is_alive()
    with pytest.raises(StopIteration):
        next(feed)
    feed.close()


def test_the_wait_is_reported(shardings, monkeypatch):
    ticks = iter([10.0, 12.5, 20.0, 20.25])
    monkeypatch.setattr(feed_module, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    with DeviceFeed(numbered, SHAPE, shardings, 0) as feed:
        next(feed)
        assert feed.last_wait == 2.5
        next(feed)
        assert feed.last_wait == 0.25
