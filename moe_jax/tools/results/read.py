"""Reads the numbers of a run from its workdir; missing or damaged files become its state."""

import dataclasses
import itertools
import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.config import Config, read_config
from moe_jax.errors import UserError
from moe_jax.files import json_files
from moe_jax.model.define import ModelDef, define
from moe_jax.model.flops import active_outside_vocabulary, flops_per_token, param_counts
from moe_jax.record.provenance import DATA_RECORD
from moe_jax.record.report import METRICS, is_last, read_row

DONE = "done"
_NO_RUNS_BELOW = {"checkpoints", "stores", "tensorboard", "profile"}
_SWEEP_RECORD = "sweep.json"  # written by launch/sweep.py: run name -> overrides
_RUN_NAME = re.compile("[a-z0-9-]+")  # names made by launch/runs.py, so never a path out of here


class Sample(NamedTuple):
    """The held-out sample of an evaluation; only losses on the same sample are comparable."""

    tokens: int | None  # targets of the loss; None: not recorded
    text: str  # fingerprint of the token store; empty: not recorded
    sequence_length: int  # T, which splits the text into rows
    whole: bool  # True: the whole split, whose targets do not depend on sequence_length


@dataclasses.dataclass(frozen=True)
class Result:
    """One run.  A number is None if the workdir does not have it."""

    name: str  # its folder, relative to --workdir
    state: str  # DONE, or why it is not done
    config: Config | None = None
    sample: Sample | None = None  # of the newest evaluation; the losses below are on this sample
    heldout_rows: int | None = None  # rows of that sample
    best_heldout: float | None = None  # nats per token
    best_nodrop: float | None = None  # the best loss without drops, nats per token
    train_loss: float | None = None  # language-model loss of the last accepted step, nats per token
    tokens_per_second: float | None = None  # median of the log steps
    drop_fraction: float | None = None  # median of the log steps
    parameters: int | None = None
    active: int | None = None
    active_body: int | None = None  # active parameters outside the embedding table and the head
    expansion: float | None = None  # E / K, experts over choices per token; dense: 1
    flops_per_token: float | None = None  # model FLOPs, forward and backward
    step_tokens: int | None = None  # positions in the batch of a step, padding included
    last_step: int | None = None  # of all rows; 0: no row
    flops: float | None = None  # model FLOPs of all steps so far
    curve: tuple[tuple[float, float], ...] = ()  # (model FLOPs so far, held-out loss)
    heldout: tuple[tuple[int, float], ...] = ()  # (step, held-out loss), as in `curve`
    # (step, seconds of training until its end), by `step_seconds`; empty: not recorded
    seconds: tuple[tuple[int, float], ...] = ()


def read_runs(folder: Path) -> list[Result]:
    """Read every run at or below `folder`, and every planned run of a sweep there.

    Raises:
      UserError: there is none.
    """
    if not os.path.isdir(folder):  # also False for an invalid path
        raise UserError(f"--workdir={folder} is not a folder: use a folder with runs below it.")
    results = [read_run(path, os.path.relpath(path, folder)) for path in _run_folders(folder)]
    if not results:
        raise UserError(f"--workdir={folder} has no runs: use a folder with runs below it.")
    return results


def read_run(folder: Path, name: str) -> Result:
    """Read the run in `folder`; damaged files there never raise, they become its state."""
    if not os.path.isdir(folder):  # also False for an invalid path
        return Result(name, "not started")
    try:
        config = read_config(folder / "config.json")
        model = define(config.model, config.precision)
        counts = param_counts(model)
        per_token = flops_per_token(model, config.data.sequence_length)
    except FileNotFoundError:
        return Result(name, "no config.json")
    except (UserError, ValueError) as error:  # ValueError: the vocabulary was never resolved
        return Result(name, str(error).removeprefix(f"{folder}/"))
    known: dict[str, Any] = {
        "config": config,
        "parameters": counts.total,
        "active": counts.active,
        "active_body": active_outside_vocabulary(model),
        "expansion": _expansion(model),
        "flops_per_token": per_token,
        "step_tokens": config.train.batch_size * config.data.sequence_length,
    }
    try:
        rows, broken = _read_rows(folder / METRICS)
    except FileNotFoundError:
        return Result(name, f"no {METRICS}", **known)
    except UserError as error:
        return Result(name, str(error).removeprefix(f"{folder}/"), **known)
    step_flops = per_token * known["step_tokens"]
    train = [row for row in rows if "loss" in row]
    accepted = [row for row in train if not _refused(row)]
    text = _text_of(folder)
    heldout = [(row, _sample(row, config, text)) for row in rows if "eval_loss" in row]
    # eval.rows may have changed when the run was resumed.
    newest = heldout[-1][1] if heldout else None
    alike = [row for row, sample in heldout if sample == newest]
    losses = [(row["step"], _number(row, "eval_loss")) for row in alike]
    points = tuple((step, loss) for step, loss in losses if loss is not None)
    last_step = max((row["step"] for row in rows), default=0)
    return Result(
        name,
        _state(config, rows, train, broken),
        sample=newest,
        heldout_rows=_count(alike[-1], "eval_rows") if alike else None,
        best_heldout=min((loss for _, loss in points), default=None),
        best_nodrop=_least(alike, "eval_loss_nodrop"),
        train_loss=_number(accepted[-1], "lm_loss") if accepted else None,
        tokens_per_second=_median(train, "tokens_per_second"),
        drop_fraction=_median(accepted, "drop_fraction"),
        last_step=last_step,
        flops=last_step * step_flops,
        curve=tuple((step * step_flops, loss) for step, loss in points),
        heldout=points,
        seconds=_seconds(train),
        **known,
    )


def _expansion(model: ModelDef) -> float:
    """E / K: routed experts over choices per token; 1 in a dense model."""
    if model.components is None:
        return 1.0
    return model.config.moe.num_experts / model.components.router.choices_per_token


def _seconds(train: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, float], ...]:
    """(step, seconds until its end): steps since the row before, times their `step_seconds`."""
    found, total, before = [], 0.0, 0
    for row in train:
        each = _number(row, "step_seconds")
        if each is None:
            return ()
        total += each * max(0, row["step"] - before)
        before = row["step"]
        found.append((before, total))
    return tuple(found)


def _run_folders(folder: Path) -> list[Path]:
    """List planned runs in their sweep's order, even without a folder; then all other runs."""
    planned: dict[Path, None] = {}
    found = []
    for here, below, files in os.walk(folder):
        below[:] = sorted(name for name in below if name not in _NO_RUNS_BELOW)
        path = Path(here)
        if _SWEEP_RECORD in files:
            planned |= dict.fromkeys(path / name for name in _planned(path / _SWEEP_RECORD))
        if "config.json" in files or METRICS in files:
            found.append(path)
    return [*planned, *(path for path in found if path not in planned)]


def _planned(path: Path) -> list[str]:
    try:
        names = json_files.read(path)
    except (FileNotFoundError, UserError):
        return []
    if not isinstance(names, Mapping):
        return []
    return [name for name in names if _RUN_NAME.fullmatch(name)]


def _read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Read (rows, number of broken lines); a truncated last line, left by a kill, is ignored."""
    rows, broken = [], 0
    lines = json_files.read_lines(path)
    for line in lines:
        row = read_row(line)
        if row is not None:
            rows.append(row)
        elif line is not lines[-1] or line.endswith(b"\n"):
            broken += 1
    return rows, broken


def _state(config: Config, rows: Sequence[Mapping], train: Sequence[Mapping], broken: int) -> str:
    steps = config.train.steps
    if broken:
        return f"{METRICS}: {broken} broken line{'s' * (broken > 1)}"
    # Check this first, because the last step of a finished run may have been skipped.
    if any("eval_loss" in row and row["step"] >= steps for row in rows):
        return DONE
    if any(is_last(row, steps, config.data.max_epochs) for row in rows):
        return DONE
    # Every skipped step has a row.  A few at the end are not divergence: the run continues, or was
    # stopped there.
    last = list(itertools.takewhile(_refused, reversed(train)))
    if len(last) > config.train.max_skipped or (last and "skipped" not in last[0]):
        return f"diverged at step {last[0]['step']}"
    return f"step {max((row['step'] for row in rows), default=0)} of {steps}"


def _refused(row: Mapping[str, Any]) -> bool:
    """True if the step was skipped; in rows from before the step guard, if it is not finite."""
    if "skipped" in row:
        return bool(_number(row, "skipped"))
    numbers = [_number(row, name, keep=True) for name in ("loss", "grad_norm")]
    return not all(math.isfinite(number or 0.0) for number in numbers)


def _sample(row: Mapping[str, Any], config: Config, text: str) -> Sample:
    """The sample of an evaluation row; `config` is the run's current one."""
    rows = _count(row, "eval_rows")
    whole = rows is not None and (config.eval.rows == 0 or rows < config.eval.rows)
    return Sample(_count(row, "eval_tokens"), text, config.data.sequence_length, whole)


def _text_of(folder: Path) -> str:
    """The fingerprint of a run's token store; empty: not recorded."""
    try:
        record = json_files.read(folder / DATA_RECORD)
    except (FileNotFoundError, UserError):
        return ""
    found = record.get("fingerprint") if isinstance(record, Mapping) else None
    return found if isinstance(found, str) else ""


def _median(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    numbers = [number for row in rows if (number := _number(row, key)) is not None]
    return statistics.median(numbers) if numbers else None


def _least(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return min((n for row in rows if (n := _number(row, key)) is not None), default=None)


def _count(row: Mapping[str, Any], key: str) -> int | None:
    number = _number(row, key)
    return None if number is None else int(number)


def _number(row: Mapping[str, Any], key: str, keep: bool = False) -> float | None:
    """row[key] as a number; None: there is none, or it is not finite (unless `keep`)."""
    try:
        number = float(row.get(key, ""))
    except (TypeError, ValueError, OverflowError):
        return None
    return number if keep or math.isfinite(number) else None
