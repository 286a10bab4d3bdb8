"""One step of a run again: python -m moe_jax.replay --workdir=DIR --step=N

Restores the newest good checkpoint before step N, takes the steps to N with the data they had, and
prints loss, gradient norm, whether the step was refused, and each layer's routing.  Exits 0 where
all of it equals, bit for bit, what the run wrote down, else 1 with one sentence.  A step that was
not logged is judged by the next one that was.  Nothing in the workdir is moved or written.
"""

import math
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from moe_jax import json_files
from moe_jax.config import Config, fingerprint, read_config
from moe_jax.data.feed import DeviceFeed
from moe_jax.errors import UserError
from moe_jax.markdown import table
from moe_jax.parallel import distributed
from moe_jax.train import flags
from moe_jax.train.evaluate import batch_shardings
from moe_jax.train.flight import record_path
from moe_jax.train.loop import compile_step
from moe_jax.train.report import METRICS, plain
from moe_jax.train.rewind import Rewind, ordered_rows, read_rewinds
from moe_jax.train.setup import Run, fresh_state, prepare, restored_state, set_numerics
from moe_jax.train.state import TrainState
from moe_jax.train.step_log import step_row, why_refused
from moe_jax.train.workdir import Folder

Row = dict[str, Any]

_FLAGS = (
    flags.Flag("step", 0, "The step, counted from 1 as in metrics.jsonl."),
    flags.Flag("flight", True, "As its flight record has it; --noflight: as it went after that."),
    flags.Flag("from_beginning", False, "Where no checkpoint is early enough: from step 0."),
    flags.Flag("init_from", "", "With --from_beginning: what the run was started with."),
    *flags.PROCESS_FLAGS,
)
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
    usable: float  # the last checkpoint that is of this past


def main(argv: Sequence[str]) -> int:
    """Prints the step; returns 1 where it is not what was written down."""
    given = flags.parse(argv, extra=_FLAGS, config=False).flags
    workdir, step = epath.Path(given.workdir), given.step
    # ---- what is known
    config = _config(workdir)
    rewinds = read_rewinds(workdir)
    past = _logged(workdir, rewinds)
    if given.flight and record_path(workdir, step).exists():
        past = _flown(workdir, step, rewinds, config)
    # ---- the run as it was
    distributed.start(given.coordinator, given.process_count, given.process_id)
    set_numerics(config)
    _check_devices(config)
    run = prepare(config, workdir, lambda line: None)
    start = _start(run, step, past, given.from_beginning)
    judge = _judge(past, start, step)
    state = restored_state(run, start, _say) if start else fresh_state(run, given.init_from, _say)
    # ---- the steps, and what they are held against
    _say(f"replaying steps {start + 1} to {max(step, judge)}")
    rows = replay(run, state, past.rewinds, {step, judge})
    _say(describe(rows[step]))
    different = differences(rows[judge], past.rows[judge])
    if different:
        names = ", ".join(different)
        _say(f"Step {judge} is not what {past.source} has: {names} differ{_excuse(run)}.")
        return 1
    unlogged = "" if judge == step else f" (step {step} is not in {past.source})"
    _say(f"Step {judge} is bit for bit what {past.source} has{unlogged}.")
    return 0


def replay(
    run: Run, state: TrainState, rewinds: Sequence[Rewind], wanted: Collection[int]
) -> dict[int, Row]:
    """Rows of the steps `wanted`, from `state`, which is used up, with the data of `rewinds`."""
    start, stop = int(state.step), max(wanted)
    rows_fn, found, step_fn = ordered_rows(run.batches, rewinds), {}, None
    with DeviceFeed(rows_fn, run.microbatch, batch_shardings(run), start, stop) as feed:
        for number, batch in feed:
            step_fn = step_fn or compile_step(run)
            state, metrics = step_fn(state, batch)
            if number + 1 in wanted:
                refused = why_refused(metrics, run.config.train.spike_factor)
                found[number + 1] = {
                    "step": number + 1,
                    "refused": refused,
                    **plain(step_row(metrics)),
                }
            else:
                jax.block_until_ready(metrics)  # the device may not run far ahead of the data
    return found


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


def _config(workdir: Folder) -> Config:
    path = workdir / "config.json"
    try:
        return read_config(path)
    except FileNotFoundError:
        raise UserError(f"There is no {path}: name the workdir of a run.") from None


def _logged(workdir: Folder, rewinds: tuple[Rewind, ...]) -> Past:
    """The run as metrics.jsonl has it."""
    path = workdir / METRICS
    rows = {}
    for line in json_files.read_lines(path) if path.exists() else []:
        try:
            row = json_files.parse(line)
        except ValueError:  # torn by a kill
            continue
        if isinstance(row, dict) and type(row.get("step")) is int and "loss" in row:
            rows[row["step"]] = row
    return Past(rows, METRICS, rewinds, math.inf)


def _flown(workdir: Folder, step: int, rewinds: tuple[Rewind, ...], config: Config) -> Past:
    """The run as the flight record of `step` has it, which may lie before it went back."""
    path = record_path(workdir, step)
    try:
        record = json_files.load(path)
        rows = {row["step"]: row for row in record["history"]}
        in_force, written_with = record["rewinds"], record["config"]
        if step not in rows or type(in_force) is not int or not 0 <= in_force <= len(rewinds):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: add --noflight, or bring it back.") from None
    if written_with != fingerprint(config):
        _say("config.json has changed since the flight record was written")
    source = path.relative_to(workdir).as_posix()
    usable = min((later.step for later in rewinds[in_force:]), default=math.inf)
    return Past(rows, source, rewinds[:in_force], usable)


def _check_devices(config: Config) -> None:
    mesh = config.mesh
    needed, here = mesh.batch_shards * mesh.tensor, jax.device_count()
    if needed != here:
        raise UserError(
            f"The run used {_devices(needed)} and {_devices(here)} would round otherwise: use as "
            f"many (--devices={needed} for virtual ones on the CPU)."
        )


def _devices(count: int) -> str:
    return f"{count} device{'s' if count > 1 else ''}"


def _start(run: Run, step: int, past: Past, from_beginning: bool) -> int:
    """The newest good checkpoint to replay `step` from; 0: the beginning."""
    saved = run.checkpoints.steps()
    reached = max([*past.rows, *saved], default=0)
    if not 1 <= step <= reached:
        raise UserError(f"--step={step}: the run has steps 1 to {reached}.")
    early = (found for found in reversed(saved) if found < step and found <= past.usable)
    start = next((found for found in early if run.checkpoints.verify(found) is None), 0)
    if not start and not from_beginning:
        raise UserError(
            f"No good checkpoint before step {step} is left in {run.checkpoints.root}: ask for a "
            f"later step, or add --from_beginning."
        )
    return start


def _judge(past: Past, start: int, step: int) -> int:
    """The step to compare: `step`, else the next that was written down, else the one before."""
    after = [found for found in past.rows if found >= step]
    if after:
        return min(after)
    before = [found for found in past.rows if start < found]
    if not before:
        raise UserError(
            f"{past.source} has no step after {start}, from which step {step} is replayed: there "
            f"is nothing to hold it against."
        )
    return max(before)


def _excuse(run: Run) -> str:
    """What makes a difference no surprise; empty where there is no such thing."""
    if run.mesh.devices.flat[0].platform == "gpu" and not run.config.train.deterministic:
        return " (on NVIDIA only train.deterministic=true repeats bit for bit)"
    return ""


def _say(line: str) -> None:
    if distributed.lead():
        print(line, flush=True)


def cli() -> None:
    """The console command."""
    flags.run(main)


if __name__ == "__main__":
    sys.exit(cli())
