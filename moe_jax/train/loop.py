"""The run, from its first step to its last."""

import time
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from moe_jax.data.feed import DeviceFeed
from moe_jax.parallel.distributed import AGAIN, DIVERGED, DONE, Preemption
from moe_jax.train.control import Control, Stop
from moe_jax.train.evaluate import Evaluator, batch_shardings, write_samples
from moe_jax.train.phases import Phases
from moe_jax.train.profile import Profiler
from moe_jax.train.replica_check import ReplicaCheck
from moe_jax.train.report import METRICS, Reporter, has_eval
from moe_jax.train.setup import Run
from moe_jax.train.state import TrainState, placed_state, to_disk
from moe_jax.train.step import abstract_batch, jit_train_step
from moe_jax.train.step_log import StepLog, way_on

SAMPLES = "samples.txt"


def train(
    run: Run,
    state: TrainState,
    lowered: Future[jax.stages.Lowered],
    reporter: Reporter,
    preemption: Preemption,
    watch: Phases,
) -> int:
    """Train from `state` to the end, a STOP file or a preemption; returns the exit code.

    Whatever ends the run, the last step is in a checkpoint.
    """
    config = run.config
    start, total = int(state.step), config.train.steps
    evaluate = Evaluator(run)

    if start >= total:
        return _nothing_left(run, state, evaluate, reporter, watch)

    feed = DeviceFeed(run.batches.rows, run.microbatch, batch_shardings(run), start, total)
    with feed:
        # ---- compile
        with watch("data"):
            step_number, batch = next(feed)
        began = time.perf_counter()
        with watch("compile"):
            step_fn = lowered.result().compile()
            replicas = ReplicaCheck(run, reporter.say)
        reporter.say(f"compiled the train step in {time.perf_counter() - began:.1f} s")

        # ---- steps
        control = Control(config, run.workdir, start)
        log = StepLog(run, reporter, start)
        profiler = Profiler(config.train.profile_range(), run.workdir, reporter.say)
        stop = Stop.NO
        while stop is Stop.NO:
            if profiler.turns(step_number):
                with watch("step"):
                    log.flush()
                profiler.turn()
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
                stop = control.after(done, preemption)
                save_now = control.save_now or stop is not Stop.NO
                if evaluate_now or save_now:
                    log.flush()
            if log.diverged:
                with watch("checkpoint"):
                    return _diverged(run, log, reporter)
            with watch("step"):
                differ = replicas.differ(done, state, save_now)
            if differ:
                with watch("checkpoint"):
                    replicas.give_up()
                return AGAIN
            if evaluate_now:
                with watch("evaluation"):
                    reporter.log({"step": done, **evaluate(state)})
            if save_now:
                reporter.flush()
                with watch("checkpoint"):
                    save(run, state, done)
            log.restart_clock(evaluate_now or control.save_now)
        profiler.close()

    # ---- end
    if stop is Stop.END:
        _finish(run, state, evaluate, reporter, watch)
    with watch("checkpoint"):
        run.checkpoints.wait()
    return _stopped(stop, done, reporter)


def lower_step(run: Run) -> jax.stages.Lowered:
    """The train step, traced and lowered; its state is donated."""
    jitted = jit_train_step(run.model, run.optimizer, run.step_options, run.mesh)
    state = placed_state(run.model, run.optimizer, run.mesh)
    return jitted.lower(state, abstract_batch(run.config, run.mesh))


def start_lowering(run: Run) -> Future[jax.stages.Lowered]:
    """`lower_step` in a thread: Python's part, while XLA compiles what makes the state."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="lowering")
    lowered = thread.submit(lower_step, run)
    thread.shutdown(wait=False)
    return lowered


def compile_step(run: Run) -> jax.stages.Compiled:
    """The compiled train step."""
    return lower_step(run).compile()


def save(run: Run, state: TrainState, step: int) -> None:
    """Start writing a checkpoint; returns once the values are copied."""
    run.checkpoints.save(step, to_disk(state, run.model.layout))


def _nothing_left(
    run: Run, state: TrainState, evaluate: Evaluator, reporter: Reporter, watch: Phases
) -> int:
    """Only what a kill after the last step may have cost is done again."""
    step = int(state.step)
    reporter.say(f"step {step} of {run.config.train.steps} is done: raise train.steps to go on")
    if not has_eval(run.workdir / METRICS, step):
        _finish(run, state, evaluate, reporter, watch)
    return DONE


def _diverged(run: Run, log: StepLog, reporter: Reporter) -> int:
    """Ends the save under way and says what to do; the exit code."""
    run.checkpoints.wait()
    reporter.say(f"{log.diverged}: {way_on(run.checkpoints.steps(), log.changed)}")
    return DIVERGED


def _stopped(stop: Stop, done: int, reporter: Reporter) -> int:
    """The exit code of a run whose step `done` is saved."""
    if stop is Stop.PREEMPTED:
        reporter.say(f"preempted: step {done} is saved, run the same command again")
        return AGAIN
    if stop is Stop.ASKED:
        reporter.say(f"stopped by the file STOP: step {done} is saved")
    return DONE


def _finish(
    run: Run, state: TrainState, evaluate: Evaluator, reporter: Reporter, watch: Phases
) -> None:
    """The last evaluation and the samples; the last checkpoint is written meanwhile."""
    step = int(state.step)
    texts: list[str] = []
    with watch("evaluation"):
        row = evaluate(state)
        write_samples(run, state, step, texts.append)
    if texts and jax.process_index() == 0:
        (run.workdir / SAMPLES).write_text("\n".join(texts) + "\n")
    for text in texts:
        reporter.say(text)
    reporter.log({"step": step, **row})  # last: its presence says that all of this was done
