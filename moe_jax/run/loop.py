"""The training loop: steps, evaluations, checkpoints, rewinds and the end of a run."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax

from moe_jax.data.batch import Batch
from moe_jax.data.feed import DeviceFeed, batch_shardings
from moe_jax.parallel.compile_cache import counted_hits
from moe_jax.parallel.distributed import AGAIN, DIVERGED, DONE, Preemption, lead
from moe_jax.record.report import Reporter, SilentReporter
from moe_jax.record.rewind import Rewinds
from moe_jax.record.settings import settings_go_back
from moe_jax.run.context import Run
from moe_jax.run.control import Control, Stop
from moe_jax.run.end import End, end_of, is_finished
from moe_jax.run.evaluate import Evaluator
from moe_jax.run.flight import FlightRecorder
from moe_jax.run.replica_check import ReplicaCheck
from moe_jax.run.restore import restored_state
from moe_jax.run.samples import save_samples, write_samples
from moe_jax.run.step_log import StepLog, recovery_advice, step_row
from moe_jax.train.state import TrainState, all_finite, placed_state, to_disk
from moe_jax.train.step import StepMetrics, abstract_batch, jit_train_step
from moe_jax.watch.phases import Phases
from moe_jax.watch.profile import Profiler

SAMPLES = "samples.txt"


class _Program(NamedTuple):
    """The compiled programs of a step, made once per process."""

    step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]  # donates the state
    replicas: ReplicaCheck


class _Steps(NamedTuple):
    """The result of consecutive steps, up to a reason to stop."""

    stop: Stop
    state: TrainState | None  # after the last step, saved; None after DIVERGED and DIFFER
    log: StepLog


class Trainer:
    """Runs the steps of a run until it ends.

    Args:
      run: the parts of the run that do not change.
      lowered: the train step, from `start_lowering`; it is compiled after the first batch arrives.
      reporter: receives metrics rows and log lines.
      preemption: detects SIGTERM.
      watch: labels what the main thread is doing.
      rewinds: the rewinds of the run so far; the trainer adds new ones.
      alone: raises UserError if another process may be writing to the workdir; all processes call
        it before a checkpoint is written or moved.
    """

    def __init__(
        self,
        run: Run,
        lowered: Future[jax.stages.Lowered],
        reporter: Reporter | SilentReporter,
        preemption: Preemption,
        watch: Phases,
        rewinds: Rewinds,
        alone: Callable[[], object] = lambda: None,
    ):
        self._run, self._lowered, self._reporter = run, lowered, reporter
        self._preemption, self._watch, self._rewinds = preemption, watch, rewinds
        self._alone = alone
        self._evaluate = Evaluator(run)
        self._profiler = Profiler(run.config.train.profile_range(), run.workdir, reporter.say)
        self._program: _Program | None = None

    def train(self, state: TrainState) -> int:
        """Train to the end of the run, a STOP file or a preemption.

        If more steps in a row are skipped than `train.max_skipped`, the run rewinds, up to
        `train.max_rewinds` times.  Every exit leaves the last step in a checkpoint, unless the run
        diverged or replicas of the state differ.

        Args:
          state: the train state before the first step; it is donated.

        Returns:
          The exit code of the process.
        """
        start, end = int(state.step), self._end()
        if end.line:
            self._reporter.say(end.line)
        if start >= end.step:
            return self._nothing_left(state, end)
        steps = self._take_steps(state)
        while steps.stop is Stop.DIVERGED:
            rewound = self._rewind(steps.log)
            if rewound is None:
                return DIVERGED
            if int(rewound.step) >= self._end().step:  # the rewind skipped all remaining data
                steps = steps._replace(stop=Stop.END, state=rewound)
            else:
                steps = self._take_steps(rewound)
        self._profiler.close()
        if steps.state is None:  # the replicas differ
            with self._watch("checkpoint"):
                self._compiled().replicas.give_up()
            return AGAIN
        return self._stop(steps.stop, steps.state)

    def _end(self) -> End:
        return end_of(self._run, self._rewinds.history)

    def _nothing_left(self, state: TrainState, end: End) -> int:
        """Finish a run whose steps are all done but which was killed during its last work."""
        self._reporter.say(end.reached(int(state.step)))
        if not is_finished(self._run, end, int(state.step)):
            self._finish(state, end)
        return DONE

    def _take_steps(self, state: TrainState) -> _Steps:
        """Run steps from `state`, which is before the end, until there is a reason to stop."""
        run, reporter, watch = self._run, self._reporter, self._watch
        every, start, total = run.config.eval.every, int(state.step), self._end().step
        rows = self._rewinds.rows(run.batches)
        with DeviceFeed(rows, run.microbatch, batch_shardings(run.mesh), start, total) as feed:
            with watch("data", "waiting for data"):
                step_number, batch = next(feed)
            program = self._compiled()
            control = Control(run.config, run.workdir, total)
            flight = FlightRecorder(run, self._rewinds, step_row, reporter.say)
            accepted = int(state.guard["changed"])
            log = StepLog(run, reporter, flight, start, accepted, total, self._rewinds.data_step)
            stop = Stop.CONTINUE
            while stop is Stop.CONTINUE:
                if self._profiler.toggles_at(step_number):
                    with watch("step"):
                        log.flush()
                    self._profiler.toggle()
                with watch("step"):
                    state, metrics = program.step(state, batch)
                done = step_number + 1
                watch.started(done, metrics)
                if done < total:
                    with watch("data", "waiting for data"):
                        step_number, batch = next(feed)
                evaluate_now = done < total and every > 0 and done % every == 0
                with watch("step"):
                    log.launched(done, metrics, feed.last_wait)  # waits for the previous step
                    stop = control.after(done, self._preemption)
                    save_now = control.save_now or stop is not Stop.CONTINUE
                    if evaluate_now or save_now:
                        log.flush()
                    if save_now and not log.divergence and not all_finite(state, run.mesh):
                        log.overflowed()
                if log.divergence:
                    return _Steps(Stop.DIVERGED, None, log)
                with watch("step"):
                    if program.replicas.differ(done, state, save_now):
                        return _Steps(Stop.DIFFER, None, log)
                if evaluate_now:
                    with watch("evaluation", "evaluating"):
                        reporter.log({"step": done, **self._evaluate(state)})
                if save_now:
                    with watch("checkpoint", "saving"):
                        self._alone()
                        # Save first: a slow remote copy of the rows must not cost a step.
                        save(run, state, done, self._rewinds.extra_files())
                        reporter.flush()
                log.restart_clock(evaluate_now or control.save_now)
        return _Steps(stop, state, log)

    def _compiled(self) -> _Program:
        if self._program is None:
            began = time.perf_counter()
            with self._watch("compile", "compiling the train step"), counted_hits() as hits:
                step = self._lowered.result().compile()
                kept = hits() > 0
                self._program = _Program(step, ReplicaCheck(self._run, self._reporter.say))
            took = time.perf_counter() - began
            what = "read the compiled train step" if kept else "compiled the train step"
            self._reporter.say(f"{what} in {took:.1f} s")
            if not kept and not lead():  # the reporter is silent on these processes
                print(
                    f"process {jax.process_index()} {what} in {took:.1f} s: only process 0 writes "
                    f"the compile cache; put its folder on a shared file system",
                    flush=True,
                )
        return self._program

    def _rewind(self, log: StepLog) -> TrainState | None:
        """Restore an earlier checkpoint; None, with advice in the log, if there is none."""
        run, reporter = self._run, self._reporter
        with self._watch("checkpoint", "rewinding to a checkpoint"):
            step = self._choose_rewind(log)
            if step is None:
                return None
            state = restored_state(run, step, reporter.say)
            jax.block_until_ready(state.params)
        self._watch.resumed(step)
        with self._watch("checkpoint"):
            reporter.rewind(step)
            if lead():
                settings_go_back(run.workdir, step)
        return state

    def _choose_rewind(self, log: StepLog) -> int | None:
        """Choose the step to rewind to; None, with advice in the log, if there is none."""
        run, rewinds, say = self._run, self._rewinds, self._reporter.say
        allowed, used = run.config.train.max_rewinds, len(rewinds.history)
        self._alone()
        run.checkpoints.wait()
        if used < allowed:
            step = rewinds.go_back(log.last_accepted_step, log.last, log.divergence)
            if step is not None:
                first, last = rewinds.history[-1].skipped
                say(
                    f"REWIND {used + 1} of {allowed}: {log.divergence}; resumes from step {step}, "
                    f"skips the batches of data steps {first} to {last}"
                )
                return step
        advice = recovery_advice(run.checkpoints.steps(), log.last_accepted_step)
        spent = f" (rewinds: {used} of train.max_rewinds {allowed} used)" if used else ""
        say(f"{log.divergence}: {advice}{spent}")
        return None

    def _stop(self, stop: Stop, state: TrainState) -> int:
        """End the run with `state`, which is saved or being saved; returns the exit code."""
        step = int(state.step)
        if stop is Stop.END:
            end = self._end()
            self._finish(state, end)
            if end.epochs:
                self._reporter.say(end.used_up(step))
        with self._watch("checkpoint", "waiting for the checkpoint to be written"):
            self._run.checkpoints.wait()
        if stop is Stop.PREEMPTED:
            self._reporter.say(f"preempted: step {step} is saved, run the same command again")
            return AGAIN
        if stop is Stop.ASKED:
            self._reporter.say(f"stopped by the file STOP: step {step} is saved")
        return DONE

    def _finish(self, state: TrainState, end: End) -> None:
        """Run the last evaluation and write the samples, while the last checkpoint is written."""
        run, step = self._run, int(state.step)
        texts: list[str] = []
        with self._watch("evaluation", "evaluating"):
            row = self._evaluate(state)
        with self._watch("evaluation", "sampling"):
            write_samples(run, state, step, texts.append)
        for text in texts:
            self._reporter.say(text)
        if texts:
            self._reporter.text(step, "samples", "\n\n".join(texts))
        why = {"max_epochs": end.epochs} if end.epochs else {}
        with self._watch("checkpoint"):
            if texts and lead():
                save_samples(run.workdir / SAMPLES, texts, self._reporter.say)
            # Log this row last: `is_finished` takes it as the sign that the rest is done.
            self._reporter.log({"step": step, **why, **row})


def lower_step(run: Run) -> jax.stages.Lowered:
    """Trace and lower the train step, which donates its state."""
    jitted = jit_train_step(run.model, run.optimizer, run.step_options, run.mesh)
    state = placed_state(run.model, run.optimizer, run.mesh)
    return jitted.lower(state, abstract_batch(run.microbatch, run.mesh))


def start_lowering(run: Run) -> Future[jax.stages.Lowered]:
    """Run `lower_step` in a thread, so that tracing overlaps with making the first state."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="lowering")
    lowered = thread.submit(lower_step, run)
    thread.shutdown(wait=False)
    return lowered


def compile_step(run: Run) -> jax.stages.Compiled:
    """Compile the train step."""
    return lower_step(run).compile()


def save(run: Run, state: TrainState, step: int, extra_files: Mapping[str, Any] = {}) -> None:
    """Start writing a checkpoint; returns when its values are copied.

    Args:
      run: the run that the state belongs to.
      state: the train state after `step`.
      step: names the checkpoint.
      extra_files: as for `Checkpoints.save`.
    """
    run.checkpoints.save(step, to_disk(state, run.model.layout), extra_files)
