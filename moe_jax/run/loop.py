"""The run, from its first step to its last."""

import contextlib
import gc
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from moe_jax.data.feed import DeviceFeed, batch_shardings
from moe_jax.parallel.distributed import AGAIN, DIVERGED, DONE, Preemption, lead
from moe_jax.record.report import METRICS, Reporter, has_last_eval
from moe_jax.record.rewind import Rewinds
from moe_jax.record.settings import settings_go_back
from moe_jax.run.context import Run
from moe_jax.run.control import Control, Stop
from moe_jax.run.end import End, end_of
from moe_jax.run.evaluate import Evaluator, write_samples
from moe_jax.run.flight import FlightRecorder
from moe_jax.run.replica_check import ReplicaCheck
from moe_jax.run.restore import restored_state
from moe_jax.run.step_log import StepLog, step_row, way_on
from moe_jax.train.state import TrainState, all_finite, placed_state, to_disk
from moe_jax.train.step import abstract_batch, jit_train_step
from moe_jax.watch.phases import Phases
from moe_jax.watch.profile import Profiler

SAMPLES = "samples.txt"


def train(
    run: Run,
    state: TrainState,
    lowered: Future[jax.stages.Lowered],
    reporter: Reporter,
    preemption: Preemption,
    watch: Phases,
    rewinds: Rewinds,
) -> int:
    """Train from `state` to the end, a STOP file or a preemption; returns the exit code.

    Where too many steps in a row are refused the run goes back, as often as `train.max_rewinds`
    allows.  Whatever ends the run, the last step is in a checkpoint, unless it diverged.
    """
    start, end = int(state.step), end_of(run, rewinds.history)
    evaluate = Evaluator(run)
    if end.line:
        reporter.say(end.line)

    # ---- already there: only what a kill after the last step may have cost
    if start >= end.step:
        if end.epochs:
            reporter.say(f"{_used_up(start, end)} is done, raise data.max_epochs to go on")
        else:
            reporter.say(f"step {start} of {end.of} is done: raise train.steps to go on")
        last = end.of if end.epochs else start
        if not has_last_eval(run.workdir / METRICS, last, end.epochs):
            _finish(run, state, evaluate, reporter, watch, end)
        return DONE

    # ---- steps
    steps = _Steps(run, lowered, reporter, preemption, watch, rewinds, evaluate)
    stop, now = steps.take(state)
    while stop is Stop.DIVERGED:
        with watch("checkpoint"):
            step = _way_back(run, steps.log, reporter, rewinds)
            if step is None:
                return DIVERGED
            state = restored_state(run, step, reporter.say)
            jax.block_until_ready(state.params)
        watch.resumed(step)
        with watch("checkpoint"):
            reporter.rewind(step)
            if lead():
                settings_go_back(run.workdir, step)
        stop, now = steps.take(state)
    steps.profiler.close()
    if stop is Stop.DIFFER:
        with watch("checkpoint"):
            steps.replicas.give_up()
        return AGAIN

    # ---- end
    assert now is not None
    done = int(now.step)
    if stop is Stop.END:
        end = end_of(run, rewinds.history)
        _finish(run, now, evaluate, reporter, watch, end)
        if end.epochs:
            reporter.say(_used_up(done, end))
    with watch("checkpoint"):
        run.checkpoints.wait()
    if stop is Stop.PREEMPTED:
        reporter.say(f"preempted: step {done} is saved, run the same command again")
        return AGAIN
    if stop is Stop.ASKED:
        reporter.say(f"stopped by the file STOP: step {done} is saved")
    return DONE


class _Steps:
    """Takes the run's steps.  What outlives going back is made once: the compiled step, the trace.

    Attributes:
      log: of the steps taken last.
      replicas: whether the state's copies are equal.
    """

    def __init__(
        self,
        run: Run,
        lowered: Future[jax.stages.Lowered],
        reporter: Reporter,
        preemption: Preemption,
        watch: Phases,
        rewinds: Rewinds,
        evaluate: Evaluator,
    ):
        self._run, self._reporter, self._watch = run, reporter, watch
        self._preemption, self._rewinds, self._evaluate = preemption, rewinds, evaluate
        self.profiler = Profiler(run.config.train.profile_range(), run.workdir, reporter.say)
        self._lowered = lowered
        self._step_fn: Any = None

    def take(self, state: TrainState) -> tuple[Stop, TrainState | None]:
        """From `state` to a reason to stop; the last state is saved, or of no use (None)."""
        run, reporter, watch = self._run, self._reporter, self._watch
        config, rows = run.config, self._rewinds.rows(run.batches)
        start, total = int(state.step), end_of(run, self._rewinds.history).step
        if start >= total:  # going back has left out all the data there was
            return Stop.END, state
        with DeviceFeed(rows, run.microbatch, batch_shardings(run.mesh), start, total) as feed:
            with watch("data"):
                step_number, batch = next(feed)
            step_fn = self._compiled()
            control = Control(config, run.workdir, total)
            flight = FlightRecorder(run, self._rewinds, step_row, reporter.say)
            log = StepLog(run, reporter, flight, start, int(state.guard["changed"]), total)
            self.log, stop = log, Stop.NO
            while stop is Stop.NO:
                if self.profiler.turns(step_number):
                    with watch("step"):
                        log.flush()
                    self.profiler.turn()
                with watch("step"):
                    state, metrics = step_fn(state, batch)
                done = step_number + 1
                watch.started(done, metrics)
                if done < total:
                    with watch("data"):
                        step_number, batch = next(feed)
                evaluate_now = done < total and config.eval.every and done % config.eval.every == 0
                with watch("step"):
                    log.started(done, metrics, feed.last_wait)  # waits for the step before this one
                    stop = control.after(done, self._preemption)
                    save_now = control.save_now or stop is not Stop.NO
                    if evaluate_now or save_now:
                        log.flush()
                    if save_now and not log.diverged and not all_finite(state, run.mesh):
                        log.overflowed()
                if log.diverged:
                    return Stop.DIVERGED, None
                with watch("step"):
                    if self.replicas.differ(done, state, save_now):
                        return Stop.DIFFER, None
                if evaluate_now:
                    with watch("evaluation"):
                        reporter.log({"step": done, **self._evaluate(state)})
                if save_now:
                    with watch("checkpoint"):
                        reporter.flush()
                        save(run, state, done, self._rewinds.beside())
                log.restart_clock(evaluate_now or control.save_now)
        return stop, state

    def _compiled(self) -> Any:
        if self._step_fn is None:
            began = time.perf_counter()
            with self._watch("compile"):
                self._step_fn = self._lowered.result().compile()
                self.replicas = ReplicaCheck(self._run, self._reporter.say)
            self._reporter.say(f"compiled the train step in {time.perf_counter() - began:.1f} s")
        return self._step_fn


def _way_back(run: Run, log: StepLog, reporter: Reporter, rewinds: Rewinds) -> int | None:
    """The step to go on from after `log.diverged`; None, and the advice is given, without one."""
    allowed, used = run.config.train.max_rewinds, len(rewinds.history)
    run.checkpoints.wait()
    if used < allowed:
        step = rewinds.go_back(log.changed, log.last, log.diverged)
        if step is not None:
            first, last = rewinds.history[-1].skipped
            reporter.say(
                f"REWIND {used + 1} of {allowed}: {log.diverged}: going on from step {step} "
                f"without steps {first} to {last} of the data"
            )
            return step
    advice = way_on(run.checkpoints.steps(), log.changed)
    spent = f" ({used} of {allowed} train.max_rewinds are used)" if used else ""
    reporter.say(f"{log.diverged}: {advice}{spent}")
    return None


def lower_step(run: Run) -> jax.stages.Lowered:
    """The train step, traced and lowered; its state is donated."""
    jitted = jit_train_step(run.model, run.optimizer, run.step_options, run.mesh)
    state = placed_state(run.model, run.optimizer, run.mesh)
    with _collecting_later():
        return jitted.lower(state, abstract_batch(run.microbatch, run.mesh))


@contextlib.contextmanager
def _collecting_later() -> Iterator[None]:
    """No search for reference cycles meanwhile.

    Tracing makes hundreds of thousands of objects that stay, and every 700 start a search, now and
    then through all there are: a seventh of the time of tracing and lowering bench_olmoe_half.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def start_lowering(run: Run) -> Future[jax.stages.Lowered]:
    """`lower_step` in a thread: Python's part, while XLA compiles what makes the state."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="lowering")
    lowered = thread.submit(lower_step, run)
    thread.shutdown(wait=False)
    return lowered


def compile_step(run: Run) -> jax.stages.Compiled:
    """The compiled train step."""
    return lower_step(run).compile()


def save(run: Run, state: TrainState, step: int, beside: Mapping[str, Any] = {}) -> None:
    """Start writing a checkpoint; returns once the values are copied.

    `beside`: as `Checkpoints.save` takes it.
    """
    run.checkpoints.save(step, to_disk(state, run.model.layout), beside)


def _used_up(step: int, end: End) -> str:
    return f"the {end.text} is used up: step {step} of {end.of}"


def _finish(
    run: Run, state: TrainState, evaluate: Evaluator, reporter: Reporter, watch: Phases, end: End
) -> None:
    """The last evaluation and the samples; the last checkpoint is written meanwhile."""
    step = int(state.step)
    texts: list[str] = []
    with watch("evaluation"):
        row = evaluate(state)
        write_samples(run, state, step, texts.append)
    for text in texts:
        reporter.say(text)
    why = {"max_epochs": end.epochs} if end.epochs else {}
    with watch("checkpoint"):
        if texts and jax.process_index() == 0:
            (run.workdir / SAMPLES).unlink(missing_ok=True)  # its other names keep what they have
            (run.workdir / SAMPLES).write_text("\n".join(texts) + "\n")
        # Last: its presence says that all of this was done.
        reporter.log({"step": step, **why, **row})
