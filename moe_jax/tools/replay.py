"""One step of a run again: python -m moe_jax replay --workdir=DIR --step=N

Restores the newest good checkpoint before step N, takes the steps to N with the data they had, and
prints loss, gradient norm, whether the step was refused, and each layer's routing.  Exits 0 where
all of it equals, bit for bit, what the run wrote down, else 1 with one sentence.  A step that was
not logged is judged by the next one that was.  Each step is taken with the config, the mesh and as
many devices as it was then (settings.jsonl); on the CPU virtual devices are made for it.  Nothing
in the workdir is moved or written.
"""

import itertools
import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax

from moe_jax.checkpoint import Checkpoints
from moe_jax.data.build import build_store, find
from moe_jax.data.config import DataConfig
from moe_jax.data.feed import DeviceFeed, batch_shardings
from moe_jax.data.store import Store
from moe_jax.errors import UserError
from moe_jax.files import json_files, records
from moe_jax.files.formats import table
from moe_jax.files.workdir import Folder
from moe_jax.parallel import distributed
from moe_jax.record.provenance import versions
from moe_jax.record.report import METRICS, plain, read_row
from moe_jax.record.rewind import Rewind, ordered_rows, read_rewinds
from moe_jax.record.settings import SETTINGS, Settings, read_settings, settings_of
from moe_jax.run.context import Run
from moe_jax.run.flight import record_path
from moe_jax.run.loop import compile_step
from moe_jax.run.restore import fresh_state, moved_state, restored_state
from moe_jax.run.setup import prepare
from moe_jax.run.step_log import step_row, why_refused
from moe_jax.train.state import TrainState

Row = dict[str, Any]
T = TypeVar("T")
MOST_VIRTUAL = 1024  # devices that are made without being asked for

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


class Past(NamedTuple):
    """What was written down of a run, or of what it did before it went back."""

    rows: Mapping[int, Row]  # by step
    source: str  # where they stand
    rewinds: tuple[Rewind, ...]  # in force then
    settings: tuple[Settings, ...]  # the same
    usable: float  # the last checkpoint that is of this past


class Leg(NamedTuple):
    """Steps in a row that were taken alike."""

    settings: Settings
    last: int


def replay(
    workdir: Folder,
    start: int,
    legs: Sequence[Leg],
    rewinds: Sequence[Rewind],
    wanted: Collection[int],
    init_from: str = "",
) -> dict[int, Row]:
    """Rows of the steps `wanted`, from the checkpoint of `start`, with the data of `rewinds`.

    0 is no checkpoint: the steps then begin with `fresh_state(run, init_from)`.
    """
    run = state = None
    found = {}
    for settings, last in legs:
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
    """`state`, which is used up, after step `last`, and the rows of steps `wanted` until then."""
    rows_fn, found, step_fn = ordered_rows(run.batches, rewinds), {}, None
    start = int(state.step)
    with DeviceFeed(rows_fn, run.microbatch, batch_shardings(run.mesh), start, last) as feed:
        for number, batch in feed:
            step_fn = step_fn or compile_step(run)
            state, metrics = step_fn(state, batch)
            if number + 1 in wanted:
                refused = why_refused(metrics, run.config.train.spike_factor)
                row = plain(step_row(metrics))
                found[number + 1] = {"step": number + 1, "refused": refused, **row}
            else:
                jax.block_until_ready(metrics)  # the device may not run far ahead of the data
    return state, found


def differences(new: Row, old: Row) -> list[str]:
    """Names of the numbers that both rows have and that are not the same."""
    names = [name for name in new if name in old and name != "layers"]
    layers, before = new["layers"], old.get("layers")
    before = before if isinstance(before, dict) else {}
    return [name for name in names if new[name] != old[name]] + [
        f"layers.{name}" for name in layers if name in before and layers[name] != before[name]
    ]


def describe(row: Row) -> str:
    """A step in lines: its numbers in full, then a table of its MoE layers."""
    line = f"step {row['step']}  loss {row['loss']}  gradient norm {row['grad_norm']}  " + (
        f"refused: {row['refused']}" if row["refused"] else "accepted"
    )
    columns = {title: row["layers"][name] for name, title in _COLUMNS.items() if row["layers"]}
    if not columns:
        return line
    cells = zip(*columns.values(), strict=True)
    body = [[str(layer), *(f"{x:.4g}" for x in of)] for layer, of in enumerate(cells)]
    return f"{line}\n{table([['MoE layer', *columns], *body], 1)}"


def read_log(workdir: Folder) -> Past:
    """The run as metrics.jsonl has it."""
    settings = read_settings(workdir)
    if not settings:
        raise UserError(f"There is no {workdir / SETTINGS}: name the workdir of a run.")
    path = workdir / METRICS
    rows = {}
    for line in json_files.read_lines(path) if path.exists() else []:
        row = read_row(line)
        if row is not None and "loss" in row:
            rows[row["step"]] = row
    return Past(rows, METRICS, read_rewinds(workdir), settings, math.inf)


def read_flight(workdir: Folder, step: int, now: Past) -> Past:
    """The run as the flight record of `step` has it, which may lie before it went back."""
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
            f"{path} is damaged or of an older version: add --noflight, or bring it back."
        ) from None
    later = [rewind.step for rewind in now.rewinds[len(rewinds) :]]
    later += [other.after for other in now.settings[len(settings) :]]
    source = path.relative_to(workdir).as_posix()
    return Past(rows, source, rewinds, settings, min(later, default=math.inf))


def _first(lines: tuple[T, ...], count: Any) -> tuple[T, ...]:
    return lines[: records.count(count, len(lines) + 1)]


def _prepared(settings: Settings, workdir: Folder) -> Run:
    """The run as it was; raises UserError where this machine cannot be what it ran on."""
    here, needed, platform = jax.device_count(), settings.devices, jax.default_backend()
    if platform != settings.platform:
        raise UserError(
            f"The run used {_devices(needed)} of kind {settings.platform} and this is "
            f"{platform}, which rounds otherwise: replay it on such a machine."
        )
    # Not some of them either: XLA's threads on the CPU, and so its sums, follow the number of all.
    if here != needed:
        raise UserError(
            f"The run used {_devices(needed)} and {_devices(here)} would round otherwise: use as "
            f"many (--devices={needed} for virtual ones on the CPU)."
        )
    return prepare(settings.typed(), workdir, lambda line: None, text=_text)


def _text(config: DataConfig, root: Folder, **reports: Any) -> Store:
    """The store, which is not built where a file of the workdir says: only in its usual place."""
    return find(config, root) if config.store else build_store(config, root, **reports)


def _devices(count: int) -> str:
    return f"{count} device{'s' if count > 1 else ''}"


def split_legs(history: Sequence[Settings], start: int, last: int) -> list[Leg]:
    """With what the steps after `start` were taken, up to `last`.

    Raises:
      UserError: not with as many devices all the way, and one process has as many as it has.
    """
    grouped = itertools.groupby(range(start + 1, last + 1), lambda step: settings_of(history, step))
    legs = [Leg(settings, max(steps)) for settings, steps in grouped]
    for leg, after in itertools.pairwise(legs):
        if leg.settings.devices != after.settings.devices:
            raise UserError(
                f"Step {leg.last} was taken with {_devices(leg.settings.devices)}, the next with "
                f"{_devices(after.settings.devices)}, and no good checkpoint is left between step "
                f"{leg.last} and step {last}: ask for another step."
            )
    return legs


def find_start(checkpoints: Checkpoints, step: int, past: Past, from_beginning: bool) -> int:
    """The newest good checkpoint to replay `step` from; 0: the beginning."""
    saved = checkpoints.steps()
    reached = max([*past.rows, *saved], default=0)
    if step > reached:
        raise UserError(f"--step={step}: the run has steps 1 to {reached}.")
    early = (found for found in reversed(saved) if found < step and found <= past.usable)
    start = next((found for found in early if checkpoints.verify(found) is None), 0)
    if not start and not from_beginning:
        raise UserError(
            f"No good checkpoint before step {step} is left in {checkpoints.root}: ask for a "
            f"later step, or add --from_beginning."
        )
    return start


def find_judge(past: Past, start: int, step: int) -> int:
    """The step to compare: `step`, else the next that was written down, else the one before."""
    devices = settings_of(past.settings, step).devices
    there = [
        found
        for found in past.rows
        if found > start and settings_of(past.settings, found).devices == devices
    ]
    after = [found for found in there if found >= step]
    if after:
        return min(after)
    if not there:
        raise UserError(
            f"{past.source} has no step after {start}, from which step {step} is replayed: there "
            f"is nothing to hold it against."
        )
    return max(there)


def excuse(legs: Sequence[Leg]) -> str:
    """What makes a difference no surprise; empty where there is no such thing."""
    for settings, last in legs:
        if settings.platform == "gpu" and not settings.typed().train.deterministic:
            return " (on NVIDIA only train.deterministic=true repeats bit for bit)"
        if settings.processes != jax.process_count():
            return (
                f" (the run took step {last} with {settings.processes} processes, between which "
                f"sums may be rounded otherwise: start as many, each with --coordinator, "
                f"--process_count and --process_id)"
            )
        here = {"XLA_FLAGS": os.environ.get("XLA_FLAGS", ""), **versions()}
        then = {"XLA_FLAGS": settings.xla_flags, **settings.versions}
        others = [n for n in ("packages", "git", "XLA_FLAGS") if then.get(n) != here[n]]
        if others:
            return f" ({' and '.join(others)} are not those of {SETTINGS})"
    return ""


def say(line: str) -> None:
    if distributed.lead():
        print(line, flush=True)
