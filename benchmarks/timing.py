"""Times a call, and a plain matmul, which shows the chip's current speed beside other figures.

    python -m benchmarks.timing

The command prints the TFLOP/s of an 8192^3 matmul in bfloat16 (1024^3 on a CPU), as one line of
JSON.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

ROUNDS, CALLS = 5, 10


def timed(call: Callable[[], Any], rest: float) -> float:
    """The seconds per call: the median of ROUNDS bursts of CALLS, each after `rest` seconds."""
    jax.block_until_ready(call())
    times = []
    for _ in range(ROUNDS):
        time.sleep(rest)
        began = time.perf_counter()
        for _ in range(CALLS):
            out = call()
        jax.block_until_ready(out)
        times.append((time.perf_counter() - began) / CALLS)
    return statistics.median(times)


def plain(rest: float) -> float:
    """The TFLOP/s of an 8192^3 matmul in bfloat16 (1024^3 on a CPU)."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    matmul = jax.jit(jnp.matmul)
    return 2 * size**3 / timed(lambda: matmul(a, a), rest) / 1e12


if __name__ == "__main__":
    print(json.dumps({"matmul_tflops_per_s": round(plain(0.0), 1)}))
