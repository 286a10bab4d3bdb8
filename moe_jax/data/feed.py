"""Puts global batches on the devices; a background thread reads their rows ahead of the step.

The consumer's own thread moves them to the devices: on NVIDIA, transfers by another thread while a
program is loaded can end the run (see parallel/xla_flags.py).
"""

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from moe_jax.data.batch import Batch
from moe_jax.errors import UserError
from moe_jax.parallel.mesh import BATCH_AXES
from moe_jax.parallel.rules import sharding

CLOSE_TIMEOUT = 5.0  # seconds to wait for a running read whose rows are no longer needed
RowsFn = Callable[[int, np.ndarray], Batch]


def batch_shardings(mesh: Mesh) -> tuple[Sharding, Sharding]:
    """The shardings of a feed's [A, B, T] and [A, B] arrays: rows split over the batch axes."""
    return sharding(mesh, (None, "batch", None)), sharding(mesh, (None, "batch"))


def put_batch(batch: Batch, mesh: Mesh, accumulation: int = 1) -> Batch:
    """Put a global batch on the devices, in the form that the train step takes.

    Args:
      batch: all rows of a step, such as from `Batches.rows(step)`.
      mesh: the rows of a microbatch are split over its batch axes.
      accumulation: number of microbatches, which consecutive rows form.

    Returns:
      jax.Arrays of shape [accumulation, rows, T] (`row_B`: [accumulation, rows]).

    Raises:
      UserError: the microbatches or the mesh do not divide the rows.
    """
    rows, T = batch.tokens_BT.shape
    parts = accumulation * math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if rows % parts:
        raise UserError(
            f"A batch of {rows} rows is not divisible by accumulation x mesh data x fsdp x expert "
            f"({parts}): change one of them."
        )
    shape = (accumulation, rows // accumulation, T)
    assemble = _Assembler(lambda step, row_ids: batch, shape, batch_shardings(mesh))
    rows_here = Batch(*(array[assemble.row_ids] for array in batch))
    return assemble.place(rows_here)


class DeviceFeed(Iterator[tuple[int, Batch]]):
    """Yields (step, batch) for consecutive steps; a batch holds global jax.Arrays.

    Arrays are [accumulation, rows, T] (`row_B`: [accumulation, rows]); the row at [a, i] is row
    `a * rows + i` of the step.  Each host reads only the rows that its own devices hold, once each.

    Attributes:
      last_wait: seconds that the consumer waited for its last batch.
    """

    def __init__(
        self,
        rows_fn: RowsFn,
        shape: tuple[int, int, int],
        shardings: tuple[Sharding, Sharding],
        start: int,
        stop: int | None = None,
        depth: int = 2,
    ):
        """Start the thread.

        Args:
          rows_fn: (step, row ids) -> Batch of NumPy arrays, such as `Batches.rows`.
          shape: (accumulation, rows, T) of the global batch.
          shardings: of the [accumulation, rows, T] arrays and of [accumulation, rows].
          start: first step.
          stop: the step after the last; None: there is no last step.
          depth: batches that are read ahead.
        """
        self.last_wait = 0.0
        self._assemble = _Assembler(rows_fn, shape, shardings)
        self._free = threading.Semaphore(depth)
        self._ready: queue.SimpleQueue[tuple[int, Batch] | BaseException | None] = (
            queue.SimpleQueue()
        )
        self._closed = threading.Event()
        self._end: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(start, stop), name="data-feed", daemon=True
        )
        self._thread.start()

    def __next__(self) -> tuple[int, Batch]:
        """Return the next step's batch.

        Raises:
          StopIteration: after the last step, or when closed.
          Exception: the error of the read, with its traceback.
        """
        if self._end is not None:
            raise self._end
        began = time.perf_counter()
        item = self._ready.get()
        self.last_wait = time.perf_counter() - began
        if isinstance(item, tuple):
            self._free.release()
            step, rows = item
            return step, self._assemble.place(rows)
        self._end = StopIteration() if item is None else item
        raise self._end

    def close(self) -> None:
        """Stop the thread and drop the batches read ahead.  A read that hangs is abandoned."""
        self._closed.set()
        self._free.release()
        self._thread.join(CLOSE_TIMEOUT)
        self._end = self._end or StopIteration()

    def __enter__(self) -> "DeviceFeed":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def _run(self, start: int, stop: int | None) -> None:
        step = start
        try:
            while stop is None or step < stop:
                self._free.acquire()
                if self._closed.is_set():
                    break
                self._ready.put((step, self._assemble.read(step)))
                step += 1
            self._ready.put(None)
        except BaseException as error:  # the consumer raises it
            self._ready.put(error)


class _Assembler:
    """Makes the global arrays of a step from the rows that this host needs, `row_ids`."""

    def __init__(
        self, rows_fn: RowsFn, shape: tuple[int, int, int], shardings: tuple[Sharding, Sharding]
    ):
        self._rows_fn = rows_fn
        self._shape = shape
        self._shardings = shardings
        needed = np.zeros(shape[:2], bool)
        for where, array_shape in zip(shardings, (shape, shape[:2]), strict=True):
            for index in where.addressable_devices_indices_map(array_shape).values():
                needed[(index or ())[:2]] = True
        self.row_ids = np.flatnonzero(needed)
        # Position of global row [a, i] among the rows read.
        self._place = (np.cumsum(needed.ravel()) - 1).reshape(shape[:2])

    def read(self, step: int) -> Batch:
        """Read the rows that this host needs, as NumPy arrays."""
        return self._rows_fn(step, self.row_ids)

    def place(self, rows: Batch) -> Batch:
        """Put the rows that `read` returned on the devices, as global arrays."""
        return Batch(*map(self._array, rows))

    def _array(self, rows: np.ndarray) -> jax.Array:
        shape = self._shape if rows.ndim == 2 else self._shape[:2]
        sharding = self._shardings[0 if rows.ndim == 2 else 1]

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            index = index or ()
            return rows[(self._place[index[:2]], *index[2:])]

        return jax.make_array_from_callback(shape, sharding, shard)
