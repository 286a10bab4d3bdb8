"""Times the train step of a prepared run."""

import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from moe_jax.bench.breakdown import breakdown
from moe_jax.data.feed import DeviceFeed
from moe_jax.model.flops import flops_per_token, param_counts
from moe_jax.parallel.chips import peak_tflops
from moe_jax.train.evaluate import batch_shardings
from moe_jax.train.loop import compile_step
from moe_jax.train.setup import Run
from moe_jax.train.state import TrainState
from moe_jax.train.step import make_gradients

WARMUP = 3  # steps that are run and not counted


def process_age() -> float:
    """Seconds since this process was started, the interpreter's own start included (Linux)."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    up = float(Path("/proc/uptime").read_text().split()[0])
    return up - ticks / os.sysconf("SC_CLK_TCK")


def peak_memory_bytes() -> int:
    """Most memory one device has held so far; on the CPU, this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(
    run: Run, state: TrainState, steps: int, gradients: bool, profile: bool
) -> dict[str, Any]:
    """Speed of `steps` steps on the run's own batches, after WARMUP that do not count.

    Returns the numbers of one JSON line; `gradients` adds forward and backward alone, `profile`
    where the device's time goes (`breakdown`).
    """
    config = run.config
    with DeviceFeed(run.batches.rows, run.microbatch, batch_shardings(run), 0) as feed:
        _, batch = next(feed)
        began = time.perf_counter()
        step_fn = compile_step(run, state, batch)
        compile_seconds = time.perf_counter() - began

        losses, dropped = [], []

        def one_step() -> None:
            nonlocal state
            state, metrics = step_fn(state, next(feed)[1])
            losses.append(float(metrics.loss.lm))
            if metrics.moe is not None:
                stats = metrics.moe.stats
                dropped.append(1 - float(stats.fates.kept.sum()) / int(stats.assignments.sum()))

        one_step()
        first_step_seconds = process_age()
        times = _times(one_step, steps)
        row: dict[str, Any] = {
            "step_ms": round(1e3 * statistics.median(times), 1),
            "step_ms_p10": _ms(times, 0.1),
            "step_ms_p90": _ms(times, 0.9),
        }
        tokens = config.train.batch_size * config.data.sequence_length
        tflop = flops_per_token(config.model, config.data.sequence_length) * tokens / 1e12
        seconds = statistics.median(times)
        peak = peak_tflops(jax.devices()[0].device_kind)
        row |= {
            "tokens_per_s": round(tokens / seconds),
            "model_tflops_per_s": round(tflop / seconds, 4),
            "mfu": None if peak is None else round(tflop / seconds / peak / run.mesh.size, 4),
        }
        if profile:
            row |= {"profile_ms": breakdown(one_step, step_fn.as_text())}
        if gradients:
            grad_fn = jax.jit(make_gradients(run.model, run.step_options, run.mesh))
            times = _times(
                lambda: jax.block_until_ready(
                    grad_fn(state.params, state.router, next(feed)[1], state.step)
                ),
                steps,
            )
            row["forward_backward_ms"] = round(1e3 * statistics.median(times), 1)
    counts = param_counts(config.model)
    return {
        **row,
        "compile_seconds": round(compile_seconds, 2),
        "first_step_seconds": round(first_step_seconds, 2),
        "peak_memory_mib": round(peak_memory_bytes() / 2**20),
        "loss": round(statistics.mean(losses[-5:]), 4),
        "drop_fraction": round(float(statistics.mean(dropped[-5:])), 4) if dropped else 0.0,
        "params": counts.total,
        "active_params": counts.active,
        "steps": steps,
        "devices": run.mesh.size,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def _times(call: Callable[[], Any], count: int) -> list[float]:
    for _ in range(WARMUP):
        call()
    times = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return times


def _ms(times: list[float], quantile: float) -> float:
    ordered = sorted(times)
    return round(1e3 * ordered[min(len(ordered) - 1, int(quantile * len(ordered)))], 1)
