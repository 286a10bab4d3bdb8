"""Held-out evaluation of a live run."""

from typing import Any

import jax
import numpy as np

from moe_jax.data.feed import DeviceFeed, batch_shardings
from moe_jax.eval.heldout import eval_row, make_eval_step
from moe_jax.run.context import Run
from moe_jax.train.state import TrainState, replicated


class Evaluator:
    """Computes held-out metrics of a train state; compiled once per run."""

    def __init__(self, run: Run):
        # A microbatch is a whole number of routing groups on every mesh, so that each group holds
        # the same held-out rows on all of them.
        _, rows, length = run.microbatch
        self._run = run
        self._shape = (1, rows, length)
        step = make_eval_step(run.model, len(run.store.sources), run.mesh)
        self._step = jax.jit(step, out_shardings=replicated(run.mesh))

    def __call__(self, state: TrainState) -> dict[str, Any]:
        """Evaluate `state` on the same held-out rows as every other call; returns a metrics row."""
        total: Any = None
        where = batch_shardings(self._run.mesh)
        heldout = self._run.heldout
        with DeviceFeed(heldout.rows, self._shape, where, 0, len(heldout)) as feed:
            for _, batch in feed:
                sums = jax.tree.map(
                    _wide, jax.device_get(self._step(state.params, state.router, batch))
                )
                total = sums if total is None else jax.tree.map(np.add, total, sums)
        return eval_row(total, self._run.store.sources, heldout.num_rows)


def _wide(x: np.ndarray) -> np.ndarray:
    """Widen the dtype for sums over batches: int32 counts overflow, float32 sums lose digits."""
    return np.asarray(x, np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64)
