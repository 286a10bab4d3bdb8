"""Reads each step's metrics one step late, so that the device always has the next step to run."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.model.flops import flops_per_token
from moe_jax.parallel.chips import peak_tflops
from moe_jax.record.report import Reporter, SilentReporter
from moe_jax.run.context import Run
from moe_jax.run.flight import FlightRecorder
from moe_jax.train.metrics import ledger_row, moe_row
from moe_jax.train.step import StepMetrics


class StepLog:
    """Waits for steps, times them, logs them and counts those that the guard refused.

    A step is started before the one in front of it is waited for: the host's work of starting one
    would otherwise leave the device idle (on an H200 7.8 ms of a step, 4.1 this way).

    Args:
      start: the step that the run goes on from.
      changed: the last step that changed the parameters, as the state has it: `start`, or an
        earlier one where the run was stopped among refused steps.
      end: the last step of the run.
      data_step: the step of the data that the step after so many others takes; the two differ
        after a rewind.

    Attributes:
      diverged: why the run cannot go on, once too many steps in a row were refused; else "".
      changed: the last step that changed the parameters.
      last: the last step that was logged; after `diverged`, the last of those refused.
    """

    def __init__(
        self,
        run: Run,
        reporter: Reporter | SilentReporter,
        flight: FlightRecorder,
        start: int,
        changed: int,
        end: int,
        data_step: Callable[[int], int] = lambda step: step,
    ):
        self.diverged, self.changed, self.last, self._end = "", changed, start, end
        self._run, self._reporter, self._flight, self._start = run, reporter, flight, start
        self._clock, self._data_step = Clock(run), data_step
        self._running: tuple[int, StepMetrics, float] | None = None

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
        every = self._run.config.train.ledger_every
        return every > 0 and (step % every == 0 or step == self._end)

    def _epochs(self, step: int) -> dict[str, float]:
        """How often each stream was read, what a rewind has left out included."""
        read = self._run.batches.epochs(self._data_step(step - 1) + 1)
        return dict(zip(self._run.store.streams, read, strict=True))

    def overflowed(self) -> None:
        """What was to be saved after the step logged last is not finite."""
        why = "the parameters or the optimizer's moments are not finite"
        self._flight.write(why, last=True)
        self.diverged = f"step {self.last} diverged ({why}) and is not saved"

    def _finish(self, step: int, metrics: StepMetrics, data_wait: float) -> None:
        metrics = jax.device_get(metrics)  # all of it small, and once
        if self.diverged:  # one more step was under way
            return
        self._clock.stepped(data_wait)
        train, self.last = self._run.config.train, step
        self._flight.saw(step, metrics)
        if not metrics.skipped:
            self.changed = step
        refused = step - self.changed  # in a row
        due = step % train.log_every == 0 or step in (self._start + 1, self._end)
        if due or refused:
            row = {"step": step, **step_row(metrics), **self._clock.read(step)}
            self._reporter.log(row | {"epochs": self._epochs(step)})
        if self._ledger_due(step) and not refused:  # what is left out counts nowhere
            self._reporter.ledger(
                {"step": step, **ledger_row(metrics.moe, self._run.store.sources)}
            )
        if refused:
            self._refused(step, refused, why_refused(metrics, train.spike_factor))

    def _refused(self, step: int, refused: int, why: str) -> None:
        over = refused > self._run.config.train.max_skipped
        if over:
            several = f"{refused} steps in a row were refused; of the last " if refused > 1 else ""
            self.diverged = f"step {step} diverged ({several}{why}) and is not saved"
        else:
            self._reporter.say(f"step {step} is left out: {why}")
        if over or refused == 1:
            self._flight.write(why, last=over)


def why_refused(metrics: StepMetrics, factor: float) -> str:
    """Why the guard refused a step; empty where it did not."""
    if not metrics.skipped:
        return ""
    if metrics.spike:
        return f"the loss or gradient norm is more than {factor:g} times its running mean"
    return "the loss or gradient is not finite"


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
    """A step's numbers, read from the devices if they are still there."""
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
        "spike": int(host.spike),
        "mean_loss": float(host.guard["loss"]),
        "mean_grad_norm": float(host.guard["grad_norm"]),
        "skipped_not_finite": int(host.guard["not_finite"]),
        "skipped_spikes": int(host.guard["spikes"]),
        **moe_row(host.moe),
    }


class Clock:
    """Seconds between readings, evaluations and saves left out."""

    def __init__(self, run: Run):
        config = run.config
        self._tokens = config.train.batch_size * config.data.sequence_length
        flops = flops_per_token(run.model, config.data.sequence_length)
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
