"""python -m moe_jax train --config=configs/tiny.py --workdir=DIR: train a model, or resume."""

import contextlib
import functools
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from moe_jax.checkpoint import Checkpoints
from moe_jax.checkpoint.agree import lead_decides
from moe_jax.cli import streams
from moe_jax.cli.commands import COMMANDS
from moe_jax.cli.parse import Parsed, parse, process_flags
from moe_jax.config import Config, from_config_dict, to_json
from moe_jax.data.build import build_store
from moe_jax.data.store import Store
from moe_jax.errors import UserError
from moe_jax.files import formats
from moe_jax.files.workdir import Folder, is_remote, locate
from moe_jax.model.flops import flops_per_token, param_counts
from moe_jax.parallel import distributed, exchange
from moe_jax.parallel.compile_cache import kept_programs
from moe_jax.parallel.distributed import DONE, lost_peer
from moe_jax.parallel.host_memory import keep_freed_memory
from moe_jax.record.lock import lock_workdir
from moe_jax.record.provenance import write_run_record
from moe_jax.record.report import METRICS, Reporter, SilentReporter
from moe_jax.record.rewind import Rewinds
from moe_jax.record.screen import Screen, Silent, open_screen
from moe_jax.record.settings import record_settings
from moe_jax.record.wandb_tracker import check_wandb
from moe_jax.run import agree
from moe_jax.run.changes import changes
from moe_jax.run.context import Run
from moe_jax.run.end import end_of, is_finished
from moe_jax.run.loop import SAMPLES, Trainer, start_lowering
from moe_jax.run.restore import restore_or_init_state
from moe_jax.run.resume import data_record, saved_config
from moe_jax.run.samples import check_samples
from moe_jax.run.setup import prepare, set_numerics
from moe_jax.sections import WatchdogConfig
from moe_jax.watch.phases import Phases
from moe_jax.watch.timekeeper import Timekeeper
from moe_jax.watch.waits import Waits
from moe_jax.watch.watchdog import LEAD_GRACE, Watchdog

# Seconds that a failing process waits for its part of a save: after 30 s all processes have ended.
SAVE_GRACE = 10.0


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    streams.go_on_without_output()  # the results of the run are in its workdir
    # ---- command line and processes
    parsed, config = _joined(argv)
    given = parsed.flags
    keep_freed_memory()
    preemption = distributed.Preemption()
    with contextlib.ExitStack() as held:
        watchdog = held.enter_context(Watchdog(config.watchdog))
        screen = open_screen() if distributed.lead() else Silent()
        held.callback(screen.close)
        waits, say = held.enter_context(Waits(screen.waiting)), screen.say

        # ---- check everything before anything is compiled
        with watchdog("start"), exchange.telling():
            agree.check_start(config, {"init_from": given.init_from})
            workdir = locate(given.workdir)
            watchdog.folder = None if is_remote(workdir) else pathlib.Path(workdir)
            set_numerics(config)
            held.enter_context(kept_programs(config.compile_cache, say))
            lead = distributed.lead()
            watchdog.grace = LEAD_GRACE if lead and jax.process_count() > 1 else 0.0
            notes = check_samples(config)
            if lead:
                check_wandb(config)
            # With the lock held, no other process changes the workdir that is read from here on.
            lock = held.enter_context(lock_workdir(workdir, say)) if lead else None
            exchange.gather("locked", "")
            on_progress = exchange.relayed(watchdog.on_progress)
            with waits("preparing the run"):
                run = prepare(
                    config,
                    workdir,
                    say,
                    on_progress=on_progress,
                    build_store=_building(waits),
                    init_from=given.init_from,
                )
            agree.check_run(run, watchdog.on_progress)
            for line in [*_describe(run), *notes]:
                say(line)
        timekeeper = held.enter_context(Timekeeper(workdir, lead))
        watch = Phases(watchdog, timekeeper, waits)

        # ---- state
        lowered, began = start_lowering(run), time.perf_counter()
        with watch("checkpoint", "making the state"):
            rewinds = Rewinds(workdir, run.checkpoints, say)
            state = restore_or_init_state(run, given.init_from, say)
            jax.block_until_ready(state.params)
            start = int(state.step)
            rewinds.check(start)
            end = end_of(run, rewinds.history)
            finished = is_finished(run, end, start)
        if finished:
            _leave_as_it_is(run, end.reached(start))
            return DONE
        with watchdog("start"):
            watch.resumed(start)
            say(f"state ready in {time.perf_counter() - began:.1f} s")
            reporter = _record(run, parsed, start, end.step, screen) if lead else SilentReporter()

        # ---- train
        with _closing(reporter, watch), _last_save(run, watch):
            preemption.defer()
            # Process 0 holds the lock; if it loses the lock, all processes end.
            alone = functools.partial(lead_decides, lock.check if lock else lambda: None)
            trainer = Trainer(run, lowered, reporter, preemption, watch, rewinds, alone)
            code = trainer.train(state)
        with watchdog("checkpoint"):
            timekeeper.ended(code)
    _say_results(workdir)
    return code


def _joined(argv: Sequence[str]) -> tuple[Parsed, Config]:
    """Parse the command line and its config, and connect the processes of the run.

    The processes connect also if the command line or config is wrong: it may be wrong on one
    process only, and the others are then told the error instead of waiting minutes for it.
    """
    given = None
    try:
        parsed = parse(argv, COMMANDS["train"])
        given = parsed.flags
        config = from_config_dict(parsed.config)
    except UserError as wrong:
        with contextlib.suppress(UserError):  # report the first error only
            _meet(given or process_flags(argv), WatchdogConfig().heartbeat)
        with exchange.telling():
            raise wrong
    _meet(given, config.watchdog.heartbeat)
    return parsed, config


def _building(waits: Waits) -> Callable[..., Store]:
    """Wrap `build_store` as a wait, because it may take hours."""

    def build(*arguments: Any, **given: Any) -> Store:
        with waits("building the store"):
            return build_store(*arguments, **given)

    return build


def _meet(given: Any, heartbeat: int) -> None:
    distributed.start(given.coordinator, given.process_count, given.process_id, heartbeat)


def _record(run: Run, parsed: Parsed, start: int, last: int, screen: Screen) -> Reporter:
    """Record the run's config and settings from step `start` on; return the step reporter."""
    write_run_record(
        str(run.workdir),
        to_json(run.config),
        parsed.overrides,
        run.store.fingerprint,
        data_record(run.store),
    )
    reporter = Reporter(run.workdir, last, start or None, run.config, screen)
    # Only now, because the Reporter moves later rows aside first.
    record_settings(run.workdir, run.config, run.mesh, start)
    return reporter


def _leave_as_it_is(run: Run, reached: str) -> None:
    """Print that the run is finished, and which changed keys had no effect."""
    _say(reached)
    saved = saved_config(run.workdir)
    changed = [] if saved is None else changes(saved, run.config)
    keys = ", ".join(change.key for change in changed)
    without = f"; these keys had no effect: {keys}" if changed else ""
    _say(f"nothing to train: {run.workdir} is unchanged{without}")
    run.checkpoints.close()
    _say_results(run.workdir)


def _say_results(workdir: Folder) -> None:
    results = {"metrics": METRICS, "checkpoints": "checkpoints", "samples": SAMPLES}
    there = [(what, workdir / name) for what, name in results.items()]
    _say("   ".join(f"{what}: {path}" for what, path in there if path.exists()))


@contextlib.contextmanager
def _last_save(run: Run, watch: Phases) -> Iterator[None]:
    """Wait for the save in progress, also if an error ends the run: the saved step is good.

    Python's exit does not wait for the save, and Orbax then fails.  With several processes, the
    failing one waits at most SAVE_GRACE seconds, because a save that the others never joined cannot
    finish.  If a peer is gone, it does not wait.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            with watch("checkpoint", "saving"), contextlib.suppress(UserError):
                run.checkpoints.close()
        elif not lost_peer(error):
            _wait_a_while(run.checkpoints)
        raise
    with watch("checkpoint"):
        run.checkpoints.close()


@contextlib.contextmanager
def _closing(reporter: Reporter | SilentReporter, watch: Phases) -> Iterator[None]:
    """Close the reporter under the watchdog, because closing a file may hang too."""
    try:
        yield
    finally:
        with watch("checkpoint"):
            reporter.close()


def _wait_a_while(checkpoints: Checkpoints) -> None:
    def wait() -> None:
        with contextlib.suppress(Exception):  # report only the error that ends the run
            checkpoints.wait()

    waits = threading.Thread(target=wait, daemon=True)
    waits.start()
    waits.join(SAVE_GRACE)


def _say(line: str) -> None:
    if distributed.lead():
        print(line, flush=True)


def _describe(run: Run) -> list[str]:
    config, store = run.config, run.store
    counts = param_counts(run.model)
    flops = flops_per_token(run.model, config.data.sequence_length)
    accumulation, rows, length = run.microbatch
    return [
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, mesh {config.mesh}, "
        f"{config.precision}",
        f"{formats.count(counts.total, 2)} parameters, {formats.count(counts.active, 2)} active, "
        f"{formats.count(flops)} model FLOPs per token",
        f"{accumulation} x {rows} rows of {length} tokens per step, {config.train.steps} steps",
        f"store {store.path}: {store.train.num_tokens:,} train tokens, "
        f"{store.heldout.num_tokens:,} held-out tokens, vocabulary {store.vocab_size}",
    ]
