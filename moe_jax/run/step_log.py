"""Logs each step's metrics one step late, so that the device always has the next step queued."""

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
from moe_jax.run.load_watch import LoadWatch
from moe_jax.train.metrics import ledger_row, moe_row
from moe_jax.train.step import StepMetrics


class StepLog:
    """Waits for steps, times and logs them, and counts those that the step guard skipped.

    Step n + 1 is launched before the host waits for step n.  Otherwise the device would be idle
    while the host launches a step (on an H200: 7.8 ms per step idle, 4.1 ms this way).

    Args:
      start: the step that the run resumes from.
      last_accepted_step: the last step that changed the parameters, as recorded in the state:
        `start`, or an earlier step if the run was stopped among skipped steps.
      end: the last step of the run.
      data_step: maps the number of steps done to the data step of the next step; the two differ
        after a rewind.

    Attributes:
      divergence: why the run must stop, after too many skipped steps in a row; else "".
      last_accepted_step: the last step that changed the parameters.
      last: the last step that was logged; after `divergence`, the last skipped step.
    """

    def __init__(
        self,
        run: Run,
        reporter: Reporter | SilentReporter,
        flight: FlightRecorder,
        start: int,
        last_accepted_step: int,
        end: int,
        data_step: Callable[[int], int] = lambda step: step,
    ):
        self.divergence, self.last_accepted_step, self.last, self._end = (
            "",
            last_accepted_step,
            start,
            end,
        )
        self._run, self._reporter, self._flight, self._start = run, reporter, flight, start
        self._clock, self._data_step = Clock(run), data_step
        self._running: tuple[int, StepMetrics, float] | None = None
        parts = run.model.components
        choices = 1 if parts is None else parts.router.choices_per_token
        self._load = LoadWatch(choices, reporter.say)

    def launched(self, step: int, metrics: StepMetrics, data_wait: float) -> None:
        """Call after launching `step` and fetching the next batch; logs the previous step.

        Args:
          step: 1-based.
          metrics: of `step`, still on the devices.
          data_wait: seconds that the host waited for the next batch.
        """
        before, self._running = self._running, (step, metrics, data_wait)
        if before is not None:
            self._finish(*before)

    def flush(self) -> None:
        """Wait for the step that was launched last, and log it."""
        if self._running is not None:
            last, self._running = self._running, None
            self._finish(*last)

    def restart_clock(self, now: bool) -> None:
        """Exclude the time since the last step from the step times, if `now`."""
        if now:
            self._clock.restart()

    def _ledger_due(self, step: int) -> bool:
        every = self._run.config.train.ledger_every
        return every > 0 and (step % every == 0 or step == self._end)

    def _epochs(self, step: int) -> dict[str, float]:
        """Epochs read per stream; batches that a rewind skipped count as read."""
        read = self._run.batches.epochs(self._data_step(step - 1) + 1)
        return dict(zip(self._run.store.streams, read, strict=True))

    def overflowed(self) -> None:
        """Record a divergence: the state after the newest step is not finite, so not saved."""
        why = "the parameters or the optimizer's moments are not finite"
        self._flight.write(why, last=True)
        self.divergence = f"step {self.last} diverged ({why}) and was not saved"

    def _finish(self, step: int, metrics: StepMetrics, data_wait: float) -> None:
        metrics = jax.device_get(metrics)  # one transfer: all metrics are small
        if self.divergence:  # this step was launched before the divergence was seen
            return
        self._clock.stepped(data_wait)
        train, self.last = self._run.config.train, step
        self._flight.saw(step, metrics)
        if not metrics.skipped:
            self.last_accepted_step = step
        refused = step - self.last_accepted_step  # in a row
        if metrics.moe is not None and not refused:
            self._load.saw(step, metrics.moe.load_E)
        due = step % train.log_every == 0 or step in (self._start + 1, self._end)
        if due or refused:
            row = {"step": step, **step_row(metrics), **self._clock.read(step)}
            self._reporter.log(row | {"epochs": self._epochs(step)})
        if self._ledger_due(step) and not refused:  # a skipped step counts nowhere
            self._reporter.ledger(
                {"step": step, **ledger_row(metrics.moe, self._run.store.sources)}
            )
        if refused:
            self._refused(step, refused, why_refused(metrics, train.spike_factor))

    def _refused(self, step: int, refused: int, why: str) -> None:
        over = refused > self._run.config.train.max_skipped
        if over:
            several = f"{refused} steps in a row were skipped; the last: " if refused > 1 else ""
            self.divergence = f"step {step} diverged ({several}{why}) and was not saved"
        else:
            most = self._run.config.train.max_skipped
            self._reporter.say(
                f"step {step} skipped: {why} ({refused} in a row, train.max_skipped {most})"
            )
        if over or refused == 1:
            self._flight.write(why, last=over)


def why_refused(metrics: StepMetrics, factor: float) -> str:
    """The reason why the step guard skipped a step; empty if it did not."""
    if not metrics.skipped:
        return ""
    if metrics.spike:
        return f"loss or gradient norm is more than {factor:g} times its running mean"
    return "loss or gradient norm is not finite"


def recovery_advice(saved: Sequence[int], last_accepted_step: int) -> str:
    """The advice after a divergence; completes the sentence in `StepLog.divergence`.

    Checkpoints written at or after step `last_accepted_step`, the last that changed the parameters,
    hold the parameters that diverged, so resuming from them would diverge again.
    """
    before = [step for step in saved if step < last_accepted_step]
    useless = ", ".join(str(step) for step in saved if step >= last_accepted_step)
    first = f"move {useless} out of checkpoints/ (they hold the parameters that diverged), "
    origin = f"step {before[-1]}" if before else "the beginning"
    return (
        f"{first if useless else ''}lower optimizer.learning_rate and run again to resume from "
        f"{origin}"
    )


def step_row(metrics: StepMetrics) -> dict[str, Any]:
    """Make the metrics row of a step; reads arrays from the devices if they are still there."""
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
    """Measures speed between readings; evaluations and saves are excluded."""

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
        """Count a finished step, during which the host waited `data_wait` seconds for data."""
        now = time.perf_counter()
        self._wait += data_wait
        self._seconds += now - self._mark
        self._mark = now
        self._steps += 1

    def restart(self) -> None:
        """Exclude the time since the last step from the step times."""
        self._mark = time.perf_counter()

    def read(self, step: int) -> dict[str, Any]:
        """The speed since the last reading.

        `tokens` counts the positions of all batches so far, padding included; model FLOPs are
        those of active parameters (model/flops.py).
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
