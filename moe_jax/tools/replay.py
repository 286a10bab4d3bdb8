"""Repeats one step of a run and compares it bit for bit with the log; see cli/replay.py.

The newest good checkpoint before the step is restored, and the steps from there run on the same
batches, each with the config, mesh and number of devices that it had (settings.jsonl).  Nothing in
the workdir is moved or written.
"""

import itertools
import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax

from moe_jax.checkpoint import Checkpoints
from moe_jax.data.build import build_store, open_built_store
from moe_jax.data.config import DataConfig
from moe_jax.data.feed import DeviceFeed, batch_shardings
from moe_jax.data.store import Store
from moe_jax.errors import UserError
from moe_jax.files import json_files, records
from moe_jax.files.formats import table
from moe_jax.files.workdir import Folder
from moe_jax.parallel import distributed
from moe_jax.record.provenance import versions
from moe_jax.record.report import METRICS, read_row, to_json_value
from moe_jax.record.rewind import Rewind, ordered_rows, read_rewinds
from moe_jax.record.settings import SETTINGS, Settings, read_settings, settings_at
from moe_jax.run.context import Run
from moe_jax.run.flight import record_path
from moe_jax.run.loop import compile_step
from moe_jax.run.restore import fresh_state, moved_state, restored_state
from moe_jax.run.setup import prepare
from moe_jax.run.step_log import step_row, why_refused
from moe_jax.train.state import TrainState

Row = dict[str, Any]
T = TypeVar("T")
MOST_VIRTUAL = 1024  # most virtual devices that are made without --devices

_COLUMNS = {
    "load_max_over_mean": "load max/mean",
    "load_min_over_mean": "min/mean",
    "dead_experts": "dead experts",
    "drop_fraction": "dropped",
    "lost_tokens": "lost tokens",
    "router_entropy": "entropy",
    "balance_loss": "balance loss",
    "z_loss": "z-loss",
}


class RunHistory(NamedTuple):
    """The logged history of a run, or its history before a rewind."""

    rows: Mapping[int, Row]  # by step
    source: str  # the file that has the rows, relative to the workdir
    rewinds: tuple[Rewind, ...]  # in force at that time
    settings: tuple[Settings, ...]  # in force at that time
    last_usable_step: float  # the last step whose checkpoint belongs to this history


class Segment(NamedTuple):
    """Consecutive steps with the same settings."""

    settings: Settings
    last: int


def replay(
    workdir: Folder,
    start: int,
    segments: Sequence[Segment],
    rewinds: Sequence[Rewind],
    wanted: Collection[int],
    init_from: str = "",
) -> dict[int, Row]:
    """Repeat the steps after `start` and return the rows of the steps `wanted`.

    Args:
      workdir: of the run.
      start: the step whose checkpoint is restored; 0: start with `fresh_state(run, init_from)`.
      segments: the settings of the steps after `start`.
      rewinds: the rewinds that decide which batches each step reads.
      wanted: the steps, counted from 1, whose rows are returned.
      init_from: the run's own --init_from; empty: none.
    """
    run = state = None
    found = {}
    for settings, last in segments:
        before, run = run, _prepared(settings, workdir)
        if state is not None and before is not None:
            state = moved_state(state, before, run, say)
        else:
            state = restored_state(run, start, say) if start else fresh_state(run, init_from, say)
        state, rows = _taken(run, state, rewinds, last, wanted)
        found |= rows
    return found


def _taken(
    run: Run, state: TrainState, rewinds: Sequence[Rewind], last: int, wanted: Collection[int]
) -> tuple[TrainState, dict[int, Row]]:
    """Run the steps up to `last` (donates `state`); return the new state and the wanted rows."""
    rows_fn, found, step_fn = ordered_rows(run.batches, rewinds), {}, None
    start = int(state.step)
    with DeviceFeed(rows_fn, run.microbatch, batch_shardings(run.mesh), start, last) as feed:
        for number, batch in feed:
            step_fn = step_fn or compile_step(run)
            state, metrics = step_fn(state, batch)
            if number + 1 in wanted:
                refused = why_refused(metrics, run.config.train.spike_factor)
                row = to_json_value(step_row(metrics))
                found[number + 1] = {"step": number + 1, "refused": refused, **row}
            else:
                jax.block_until_ready(metrics)  # keeps few batches on the device at a time
    return state, found


def differences(new: Row, old: Row) -> list[str]:
    """The names of the numbers that both rows have and that differ."""
    names = [name for name in new if name in old and name != "layers"]
    layers, before = new["layers"], old.get("layers")
    before = before if isinstance(before, dict) else {}
    return [name for name in names if new[name] != old[name]] + [
        f"layers.{name}" for name in layers if name in before and layers[name] != before[name]
    ]


def describe(row: Row) -> str:
    """Describe a step: its numbers with all digits, then a table of its MoE layers."""
    line = f"step {row['step']}  loss {row['loss']}  gradient norm {row['grad_norm']}  " + (
        f"skipped: {row['refused']}" if row["refused"] else "accepted"
    )
    columns = {title: row["layers"][name] for name, title in _COLUMNS.items() if row["layers"]}
    if not columns:
        return line
    cells = zip(*columns.values(), strict=True)
    body = [[str(layer), *(f"{x:.4g}" for x in of)] for layer, of in enumerate(cells)]
    return f"{line}\n{table([['MoE layer', *columns], *body], 1)}"


def read_log(workdir: Folder) -> RunHistory:
    """Read the history of a run from metrics.jsonl; raises UserError if there is no run."""
    settings = read_settings(workdir)
    if not settings:
        raise UserError(f"There is no {workdir / SETTINGS}: set --workdir to the one of a run.")
    path = workdir / METRICS
    rows = {}
    for line in json_files.read_lines(path) if path.exists() else []:
        row = read_row(line)
        if row is not None and "loss" in row:
            rows[row["step"]] = row
    return RunHistory(rows, METRICS, read_rewinds(workdir), settings, math.inf)


def read_flight(workdir: Folder, step: int, now: RunHistory) -> RunHistory:
    """Read the history in the flight record of `step`, which may be from before a rewind."""
    path = record_path(workdir, step)
    try:
        record = json_files.load(path)
        rows = {row["step"]: row for row in record["history"]}
        rewinds, settings = (
            _first(getattr(now, name), record[name]) for name in ("rewinds", "settings")
        )
        if step not in rows:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is damaged or of an older version: restore the file, or add --noflight."
        ) from None
    later = [rewind.step for rewind in now.rewinds[len(rewinds) :]]
    later += [other.after for other in now.settings[len(settings) :]]
    source = path.relative_to(workdir).as_posix()
    return RunHistory(rows, source, rewinds, settings, min(later, default=math.inf))


def _first(lines: tuple[T, ...], count: Any) -> tuple[T, ...]:
    return lines[: records.count(count, len(lines) + 1)]


def _prepared(settings: Settings, workdir: Folder) -> Run:
    """Prepare the run with `settings`; raises UserError if this machine's devices differ."""
    here, needed, platform = jax.device_count(), settings.devices, jax.default_backend()
    if platform != settings.platform:
        raise UserError(
            f"The run used {_devices(needed)} of kind {settings.platform}, and {platform} rounds "
            f"differently: replay it on {settings.platform}."
        )
    # A subset of the devices would not do: on the CPU the number of XLA's threads, and with it the
    # order of its sums, depends on the number of all devices.
    if here != needed:
        raise UserError(
            f"The run used {_devices(needed)}, and {_devices(here)} would round differently: use "
            f"{needed} (--devices={needed} for virtual ones on the CPU)."
        )
    return prepare(settings.typed(), workdir, lambda line: None, build_store=_open_or_build)


def _open_or_build(config: DataConfig, root: Folder, **reports: Any) -> Store:
    """Open the store; build it only in its default folder, not in one that the config names."""
    return open_built_store(config, root) if config.store else build_store(config, root, **reports)


def _devices(count: int) -> str:
    return f"{count} device{'s' if count > 1 else ''}"


def split_segments(history: Sequence[Settings], start: int, last: int) -> list[Segment]:
    """Group the steps after `start`, up to `last`, by their settings.

    Raises:
      UserError: the number of devices changed, which one process cannot repeat.
    """
    grouped = itertools.groupby(range(start + 1, last + 1), lambda step: settings_at(history, step))
    segments = [Segment(settings, max(steps)) for settings, steps in grouped]
    for segment, after in itertools.pairwise(segments):
        if segment.settings.devices != after.settings.devices:
            raise UserError(
                f"Step {segment.last} used {_devices(segment.settings.devices)}, the next step "
                f"used {_devices(after.settings.devices)}, and there is no good checkpoint between "
                f"step {segment.last} and step {last}: set --step to a step near a checkpoint."
            )
    return segments


def find_start(checkpoints: Checkpoints, step: int, past: RunHistory, from_beginning: bool) -> int:
    """Find the newest good checkpoint before `step`; 0: start from the beginning."""
    saved = checkpoints.steps()
    reached = max([*past.rows, *saved], default=0)
    if step > reached:
        raise UserError(f"--step={step}: the run has steps 1 to {reached}.")
    early = (found for found in reversed(saved) if found < step and found <= past.last_usable_step)
    start = next((found for found in early if checkpoints.verify(found) is None), 0)
    if not start and not from_beginning:
        raise UserError(
            f"There is no good checkpoint before step {step} in {checkpoints.root}: set --step to "
            f"a later step, or add --from_beginning."
        )
    return start


def find_judge(past: RunHistory, start: int, step: int) -> int:
    """Choose the step to compare: `step`, or the next logged step, or the last one before."""
    devices = settings_at(past.settings, step).devices
    there = [
        found
        for found in past.rows
        if found > start and settings_at(past.settings, found).devices == devices
    ]
    after = [found for found in there if found >= step]
    if after:
        return min(after)
    if not there:
        raise UserError(
            f"{past.source} has no step after {start}, from which step {step} is replayed, so "
            f"nothing can be compared: set --step to an earlier step."
        )
    return max(there)


def excuse(segments: Sequence[Segment]) -> str:
    """A known reason for a difference, in parentheses; empty: there is none."""
    for settings, last in segments:
        if settings.platform == "gpu" and not settings.typed().train.deterministic:
            return " (on NVIDIA only train.deterministic=true repeats bit for bit)"
        if settings.processes != jax.process_count():
            return (
                f" (the run had {settings.processes} processes at step {last}, and sums between "
                f"processes may round differently: start {settings.processes} processes with "
                f"--coordinator, --process_count and --process_id)"
            )
        here = {"XLA_FLAGS": os.environ.get("XLA_FLAGS", ""), **versions()}
        then = {"XLA_FLAGS": settings.xla_flags, **settings.versions}
        others = [n for n in ("packages", "git", "XLA_FLAGS") if then.get(n) != here[n]]
        if others:
            return f" ({' and '.join(others)} differ from {SETTINGS})"
    return ""


def say(line: str) -> None:
    if distributed.lead():
        print(line, flush=True)
