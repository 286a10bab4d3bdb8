"""A faulty device, which flips one bit in its replica of the state.

`python faulty_device.py STEP ARGUMENTS` is `moe_jax train` with this fault on the last device after
STEP.
"""

import dataclasses
import sys
from concurrent.futures import Future
from types import SimpleNamespace

import jax
import numpy as np

from moe_jax.cli import train as program
from moe_jax.cli.exit import run


def one_ulp(x: jax.Array, number: int) -> jax.Array:
    """Flip the lowest bit of the first element of `x` in the replica on device `number`."""
    buffers = []
    for shard in x.addressable_shards:
        value = np.array(shard.data)
        if shard.device.id == number:
            value.reshape(-1).view(np.uint32)[0] ^= 1
        buffers.append(jax.device_put(value, shard.device))
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, buffers)


def corrupts(step: int, number: int = -1):
    """A `start_lowering` whose step corrupts `embed_VD` on device `number` (-1: last) at `step`."""
    start = program.start_lowering

    def start_lowering(run):
        lowered, faulty_one = start(run), Future()

        def compiled():
            step_fn = lowered.result().compile()
            return lambda state, batch: faulty(step_fn, state, batch)

        def faulty(step_fn, state, batch):
            state, metrics = step_fn(state, batch)
            if int(state.step) == step:
                device = jax.devices()[number].id
                params = state.params | {"embed_VD": one_ulp(state.params["embed_VD"], device)}
                state = dataclasses.replace(state, params=params)
            return state, metrics

        faulty_one.set_result(SimpleNamespace(compile=compiled))
        return faulty_one

    return start_lowering


if __name__ == "__main__":
    program.start_lowering = corrupts(int(sys.argv.pop(1)))
    sys.argv[0] = "moe_jax train"
    run(program.main)
