"""Trainers with bad batches: the gradients of some data steps are multiplied by a factor.

`python -m bad_batches PLAN ARGUMENTS` runs the trainer with the bad batches of PLAN, a JSON object:
`factors` maps data steps to the factors of their gradients ("nan" or a number), and `kill` maps a
method to n: its n-th call kills the process with SIGKILL.
"""

import json
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import moe_jax.cli.train
from moe_jax.checkpoint.folder import StepFolder
from moe_jax.cli.exit import run
from moe_jax.data.batch import Batch
from moe_jax.data.pipeline import Batches
from moe_jax.record.report import Reporter
from moe_jax.record.rewind import Rewinds
from moe_jax.run.control import Control
from moe_jax.train import step as step_module

METHODS = {
    "write": (Rewinds, "_write"),
    "quarantine": (StepFolder, "set_aside"),
    "truncate": (Reporter, "rewind"),
    "step": (Control, "after"),
}


def patches(factors: Mapping[int, float], asked: list[int]) -> list[tuple[Any, str, Any]]:
    """The (object, attribute, value) to set; the data steps that are read are appended to `asked`.

    The factor is carried in `bytes_BT`, which training does not use, so good and bad batches run
    the same compiled step.
    """
    rows, make_gradients = Batches.rows, step_module.make_gradients

    def marked(self: Batches, step: int, row_ids: np.ndarray) -> Batch:
        asked.append(step)
        batch = rows(self, step, row_ids)
        factor = np.float32(factors.get(step, 1.0))
        return batch._replace(bytes_BT=np.full_like(batch.bytes_BT, factor.view(np.int32)))

    def multiplied(*arguments: Any) -> Any:
        gradients = make_gradients(*arguments)

        def bad(params: Any, router: Any, batch: Batch, step: jax.Array) -> Any:
            grads, sums, counts = gradients(params, router, batch, step)
            bits = batch.bytes_BT.reshape(-1)[0]
            factor = jax.lax.bitcast_convert_type(bits, jnp.float32)
            return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), sums, counts

        return bad

    return [(Batches, "rows", marked), (step_module, "make_gradients", multiplied)]


def kill_at(name: str, times: int) -> None:
    """Kill the process with SIGKILL at the n-th call, counted from 1, before the method runs."""
    owner, attribute = METHODS[name]
    method, calls = getattr(owner, attribute), []

    def mortal(*arguments: Any) -> Any:
        calls.append(name)
        if len(calls) == times:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*arguments)

    setattr(owner, attribute, mortal)


if __name__ == "__main__":
    plan = json.loads(sys.argv.pop(1))
    for owner, name, value in patches({int(k): float(v) for k, v in plan["factors"].items()}, []):
        setattr(owner, name, value)
    for name, times in plan.get("kill", {}).items():
        kill_at(name, times)
    sys.argv[0] = "moe_jax train"
    run(moe_jax.cli.train.main)
