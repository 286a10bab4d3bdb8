"""Times the train step of a prepared run."""

import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from moe_jax.data.batch import Batch
from moe_jax.data.feed import DeviceFeed, RowsFn, batch_shardings
from moe_jax.model.flops import flops_per_token, param_counts
from moe_jax.parallel.chips import peak_tflops
from moe_jax.parallel.process import process_age
from moe_jax.run.context import Run
from moe_jax.tools.bench.breakdown import breakdown
from moe_jax.tools.hlo import read_collectives
from moe_jax.train.state import TrainState
from moe_jax.train.step import StepMetrics, make_gradients

WARMUP = 3  # steps that run before the timed ones
StepFn = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def peak_memory_bytes() -> int:
    """The peak memory of one device so far; on the CPU, of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(
    run: Run,
    state: TrainState,
    lowered: Future[jax.stages.Lowered],
    rows: RowsFn,
    steps: int,
    gradients: bool,
    profile: bool,
) -> dict[str, Any]:
    """Time `steps` steps on batches of `rows`, after WARMUP steps; return one JSON line's numbers.

    `gradients` also times the forward and backward pass alone; `profile` also divides the device's
    time into parts (`breakdown`).
    """
    config = run.config
    with DeviceFeed(rows, run.microbatch, batch_shardings(run.mesh), 0) as feed:
        _, batch = next(feed)
        began = time.perf_counter()
        step_fn = lowered.result().compile()
        compile_seconds = time.perf_counter() - began

        steps_run = Steps(step_fn, state, feed, batch)
        steps_run.start()
        steps_run.finish()
        first_step_seconds = process_age()
        times = steps_run.times(steps)
        row: dict[str, Any] = {
            "step_ms": round(1e3 * statistics.median(times), 1),
            "step_ms_p10": _ms(times, 0.1),
            "step_ms_p90": _ms(times, 0.9),
        }
        tokens = config.train.batch_size * config.data.sequence_length
        tflop = flops_per_token(run.model, config.data.sequence_length) * tokens / 1e12
        seconds = statistics.median(times)
        peak = peak_tflops(jax.devices()[0].device_kind)
        row |= {
            "tokens_per_s": round(tokens / seconds),
            "model_tflops_per_s": round(tflop / seconds, 4),
            "mfu": None if peak is None else round(tflop / seconds / peak / run.mesh.size, 4),
        }
        text = step_fn.as_text() or ""
        if run.mesh.size > 1:
            sent = sum(one.sent(run.mesh.size) for one in read_collectives(text).found)
            row["collectives_sent_mb"] = round(sent / 1e6, 3)  # per device and step
        if profile:
            found = breakdown(steps_run.run, text)
            row |= {"profile_ms": found.parts, "collectives_hidden_ms": found.hidden_ms}
        if gradients:
            grad_fn = jax.jit(make_gradients(run.model, run.step_options, run.mesh))
            state = steps_run.state
            times = _times(
                lambda: jax.block_until_ready(
                    grad_fn(state.params, state.router, next(feed)[1], state.step)
                ),
                steps,
            )
            row["forward_backward_ms"] = round(1e3 * statistics.median(times), 1)
    counts = param_counts(run.model)
    return {
        **row,
        "compile_seconds": round(compile_seconds, 2),
        "first_step_seconds": round(first_step_seconds, 2),
        "peak_memory_mib": round(peak_memory_bytes() / 2**20),
        "loss": round(statistics.mean(steps_run.losses[-5:]), 4),
        "drop_fraction": round(statistics.mean(steps_run.dropped[-5:]), 4),
        "params": counts.total,
        "active_params": counts.active,
        "steps": steps,
        "devices": run.mesh.size,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


class Steps:
    """Runs steps as the trainer does: it starts a step before it waits for the previous one."""

    def __init__(self, step_fn: StepFn, state: TrainState, feed: DeviceFeed, batch: Batch):
        self.state = state
        self.losses: list[float] = []
        self.dropped: list[float] = []
        self._step_fn, self._feed, self._batch = step_fn, feed, batch
        self._running: list[StepMetrics] = []

    def start(self) -> None:
        """Start a step, and copy the next batch to the device while the step runs."""
        self.state, metrics = self._step_fn(self.state, self._batch)
        self._running.append(metrics)
        self._batch = next(self._feed)[1]

    def finish(self) -> None:
        """Wait for the oldest running step, but not for the step after it.

        Nothing may be computed on the device here, because it would wait behind the later step.
        """
        metrics = jax.device_get(self._running.pop(0))
        self.losses.append(float(metrics.loss.lm))
        stats = None if metrics.moe is None else metrics.moe.stats
        kept = 1.0 if stats is None else float(stats.outcomes.kept.sum() / stats.assignments.sum())
        self.dropped.append(1 - kept)

    def run(self, count: int) -> list[float]:
        """Run `count` steps; return the time at which each ended."""
        ends = []
        self.start()
        for left in reversed(range(count)):
            if left:
                self.start()
            self.finish()
            ends.append(time.perf_counter())
        return ends

    def times(self, count: int) -> list[float]:
        """The seconds of each of `count` steps, after WARMUP steps."""
        return np.diff(self.run(count + WARMUP))[-count:].tolist()


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
