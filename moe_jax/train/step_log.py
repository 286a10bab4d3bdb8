"""Reads each step's metrics one step late, so that the device always has the next step to run."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.metrics import ledger_row, moe_row
from moe_jax.model.flops import flops_per_token
from moe_jax.parallel.chips import peak_tflops
from moe_jax.train.report import Reporter
from moe_jax.train.setup import Run
from moe_jax.train.step import StepMetrics


class StepLog:
    """Waits for steps, times them, logs them and counts those that were not finite.

    A step is started before the one in front of it is waited for: the host's work of starting one
    would otherwise leave the device idle (on an H200 7.8 ms of a step, 4.1 this way).

    Attributes:
      diverged: why the run must end, once too many steps in a row were not finite; else "".
      changed: the last step that changed the parameters.
    """

    def __init__(self, run: Run, reporter: Reporter, start: int):
        self.diverged, self.changed = "", start
        self._run, self._reporter, self._start = run, reporter, start
        self._clock = Clock(run)
        self._running: tuple[int, StepMetrics, float] | None = None
        self._skipped = 0

    def started(self, step: int, metrics: StepMetrics, data_wait: float) -> None:
        """`step` was started and its successor's batch waited for; the step before is finished."""
        before, self._running = self._running, (step, metrics, data_wait)
        if before is not None:
            self._finish(*before)

    def flush(self) -> None:
        """Wait for the step that was started last, and log it."""
        if self._running is not None:
            last, self._running = self._running, None
            self._finish(*last)

    def restart_clock(self, now: bool) -> None:
        """Leave what happened since the last step out of the count, if anything did."""
        if now:
            self._clock.restart()

    def _ledger_due(self, step: int) -> bool:
        train = self._run.config.train
        return train.ledger_every > 0 and (step % train.ledger_every == 0 or step == train.steps)

    def _finish(self, step: int, metrics: StepMetrics, data_wait: float) -> None:
        jax.block_until_ready(metrics)
        self._clock.stepped(data_wait)
        train, say = self._run.config.train, self._reporter.say
        self._skipped = self._skipped + 1 if metrics.skipped else 0
        self.changed = self.changed if metrics.skipped else step
        due = step % train.log_every == 0 or step in (self._start + 1, train.steps)
        if due or self._skipped:
            self._reporter.log({"step": step, **step_row(metrics), **self._clock.read(step)})
        if self._ledger_due(step) and not self._skipped:  # what is left out counts nowhere
            row = ledger_row(jax.tree.map(np.asarray, metrics.moe), self._run.store.sources)
            self._reporter.ledger({"step": step, **row})
        if self._skipped > train.max_skipped:
            self.diverged = self.diverged or _diverged(step, self._skipped)
        elif self._skipped:
            say(f"step {step} is left out: its loss or gradient is not finite")


def _diverged(step: int, skipped: int) -> str:
    what = "its loss or gradient is not finite"
    if skipped > 1:
        what = f"the loss or gradient of {skipped} steps in a row is not finite"
    return f"step {step} diverged ({what}) and is not saved"


def way_on(saved: Sequence[int], changed: int) -> str:
    """What to do about a run that diverged: the end of the sentence that `diverged` begins.

    Checkpoints written since step `changed`, the last that changed the parameters, hold the very
    parameters that diverge.
    """
    before = [step for step in saved if step < changed]
    useless = ", ".join(str(step) for step in saved if step >= changed)
    first = f"move {useless} out of the folder checkpoints, which hold what diverges, "
    origin = f"step {before[-1]}" if before else "the beginning"
    return (
        f"{first if useless else ''}lower optimizer.learning_rate and run again, which goes on "
        f"from {origin}"
    )


def step_row(metrics: StepMetrics) -> dict[str, Any]:
    """A step's numbers, read from the devices."""
    host: StepMetrics = jax.tree.map(np.asarray, metrics)
    return {
        "loss": float(host.loss.total),
        "lm_loss": float(host.loss.lm),
        "balance_loss": float(host.loss.balance),
        "z_loss": float(host.loss.router_z),
        "logits_z_loss": float(host.loss.logits_z),
        "grad_norm": float(host.grad_norm),
        "learning_rate": float(host.learning_rate),
        "step_tokens": int(host.tokens),
        "skipped": int(host.skipped),
        **moe_row(host.moe),
    }


class Clock:
    """Seconds between readings, evaluations and saves left out."""

    def __init__(self, run: Run):
        config = run.config
        self._tokens = config.train.batch_size * config.data.sequence_length
        flops = flops_per_token(config.model, config.data.sequence_length)
        self._tflops = flops * self._tokens / 1e12
        device = run.mesh.devices.flat[0]
        peak = peak_tflops(device.device_kind)
        self._peak = None if peak is None else peak * run.mesh.size
        self._steps, self._seconds, self._wait = 0, 0.0, 0.0
        self._mark = time.perf_counter()

    def stepped(self, data_wait: float) -> None:
        """A step has ended; the host waited so many seconds for data meanwhile."""
        now = time.perf_counter()
        self._wait += data_wait
        self._seconds += now - self._mark
        self._mark = now
        self._steps += 1

    def restart(self) -> None:
        """Leave what happened since the last step out of the count."""
        self._mark = time.perf_counter()

    def read(self, step: int) -> dict[str, Any]:
        """Speed since the last reading.

        `tokens` counts places of all batches so far, padding included; model FLOPs are those of
        active parameters (model/flops.py).
        """
        seconds = self._seconds / self._steps
        rate = self._tflops / seconds
        row = {
            "tokens": step * self._tokens,
            "tokens_per_second": self._tokens / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": self._wait / self._steps,
            "model_tflops_per_second": rate,
            "mfu": None if self._peak is None else rate / self._peak,
        }
        self._steps, self._seconds, self._wait = 0, 0.0, 0.0
        return row
