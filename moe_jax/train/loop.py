"""The run, from its first step to its last."""

import time
from typing import Any

import jax
import numpy as np

from moe_jax.data.feed import DeviceFeed
from moe_jax.metrics import ledger_row, moe_row
from moe_jax.model.flops import flops_per_token
from moe_jax.parallel.chips import peak_tflops
from moe_jax.parallel.distributed import AGAIN, DIVERGED, DONE, Preemption
from moe_jax.train.control import Control, Stop
from moe_jax.train.evaluate import Evaluator, batch_shardings, write_samples
from moe_jax.train.profile import Profiler
from moe_jax.train.report import METRICS, Reporter, has_eval
from moe_jax.train.setup import Run
from moe_jax.train.state import TrainState, to_disk
from moe_jax.train.step import StepMetrics, jit_train_step

SAMPLES = "samples.txt"


def train(run: Run, state: TrainState, reporter: Reporter, preemption: Preemption) -> int:
    """Train from `state` to the end, a STOP file or a preemption; returns the exit code.

    Whatever ends the run, the last step is in a checkpoint.
    """
    config = run.config
    start, total = int(state.step), config.train.steps
    evaluate = Evaluator(run)

    # ---- already there: only what a kill after the last step may have cost
    if start >= total:
        reporter.say(f"step {start} of {total} is done: raise train.steps to go on")
        if not has_eval(run.workdir / METRICS, start):
            _finish(run, state, evaluate, reporter)
        return DONE

    feed = DeviceFeed(run.batches.rows, run.microbatch, batch_shardings(run), start, total)
    with feed:
        # ---- compile
        step_number, batch = next(feed)
        began = time.perf_counter()
        step_fn = compile_step(run, state, batch)
        reporter.say(f"compiled the train step in {time.perf_counter() - began:.1f} s")

        # ---- steps
        control = Control(config, run.workdir, start)
        clock = Clock(run)
        profiler = Profiler(config.train.profile_range(), run.workdir, reporter.say)
        stop, skipped = Stop.NO, 0
        while stop is Stop.NO:
            profiler.before(step_number)
            state, metrics = step_fn(state, batch)
            done = step_number + 1
            if done < total:
                step_number, batch = next(feed)
                clock.waited(feed.last_wait)
            # One step in flight: the next is prepared while this one runs.
            jax.block_until_ready(metrics)
            clock.stepped()
            skipped = skipped + 1 if metrics.skipped else 0
            if done % config.train.log_every == 0 or done in (start + 1, total) or skipped:
                reporter.log({"step": done, **step_row(metrics), **clock.read(done)})
            if skipped > config.train.max_skipped:
                run.checkpoints.wait()
                reporter.say(_diverged(done, skipped))
                return DIVERGED
            if skipped:
                reporter.say(f"step {done} is left out: its loss or gradient is not finite")
            if ledger_due(config.train.ledger_every, done, total):
                reporter.ledger({"step": done, **ledger_row(metrics.moe, run.store.sources)})
            if done < total and config.eval.every and done % config.eval.every == 0:
                reporter.log({"step": done, **evaluate(state)})
                clock.restart()
            stop = control.after(done, preemption)
            if control.save_now or stop is not Stop.NO:
                reporter.flush()
                save(run, state, done)
                clock.restart()
        profiler.close()

    # ---- end
    if stop is Stop.END:
        _finish(run, state, evaluate, reporter)
    run.checkpoints.wait()
    if stop is Stop.PREEMPTED:
        reporter.say(f"preempted: step {done} is saved, run the same command again")
        return AGAIN
    if stop is Stop.ASKED:
        reporter.say(f"stopped by the file STOP: step {done} is saved")
    return DONE


def _diverged(step: int, skipped: int) -> str:
    what = "its loss or gradient is not finite"
    if skipped > 1:
        what = f"the loss or gradient of {skipped} steps in a row is not finite"
    return (
        f"step {step} diverged ({what}) and is not saved: lower optimizer.learning_rate and run "
        f"again"
    )


def ledger_due(every: int, step: int, total: int) -> bool:
    """Every so many steps, and after the last one."""
    return every > 0 and (step % every == 0 or step == total)


def compile_step(run: Run, state: TrainState, batch: Any) -> Any:
    """The compiled train step, its state donated."""
    jitted = jit_train_step(run.model, run.optimizer, run.step_options, run.mesh)
    return jitted.lower(state, batch).compile()


def save(run: Run, state: TrainState, step: int) -> None:
    """Start writing a checkpoint; returns once the values are copied."""
    run.checkpoints.save(step, to_disk(state, run.model.layout))


def _finish(run: Run, state: TrainState, evaluate: Evaluator, reporter: Reporter) -> None:
    """The last evaluation and the samples; the last checkpoint is written meanwhile."""
    step = int(state.step)
    texts: list[str] = []
    row = evaluate(state)
    write_samples(run, state, step, texts.append)
    if texts and jax.process_index() == 0:
        (run.workdir / SAMPLES).write_text("\n".join(texts) + "\n")
    for text in texts:
        reporter.say(text)
    reporter.log({"step": step, **row})  # last: its presence says that all of this was done


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

    def waited(self, seconds: float) -> None:
        """Data was waited for so long."""
        self._wait += seconds

    def stepped(self) -> None:
        """A step has ended."""
        now = time.perf_counter()
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
