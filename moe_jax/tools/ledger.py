"""Adds up WORKDIR/ledger.jsonl, the outcomes of a run's assignments, and prints them as tables.

The file has the counts of every `train.ledger_every`-th step by expert, position in the row and
data source; shares are fractions of the line's own assignments.  L MoE layers, E experts, N (or n)
entries of an axis: experts, position buckets or sources.
"""

import csv
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.errors import UserError
from moe_jax.files import json_files, records
from moe_jax.files.formats import table
from moe_jax.files.workdir import Folder
from moe_jax.moe.types import Ledger, Outcomes

_HEADINGS = {
    "kept": "kept",
    "dropped_capacity": "over capacity",
    "dropped_buffer": "over buffer",
    "unsampled": "not sampled",
    "padding": "padding",
}
WORST = 16  # experts listed when there are more


@dataclasses.dataclass(frozen=True)
class Totals:
    """The summed counts of some steps of a run."""

    steps: list[int]
    sources: list[str]
    assignments: np.ndarray  # [L], from the shapes of the router's assignments
    ledger: Ledger  # Outcomes of int64 arrays [L, n]


def read(path: Folder, from_step: int = 0) -> Totals:
    """Add up the counts of all rows from `from_step` on.

    Raises:
      UserError: there is no such file, a line is damaged, or there is no row.
    """
    try:
        lines = json_files.read_lines(path)
    except (FileNotFoundError, UserError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else str(error).rstrip(".")
        raise UserError(
            f"{path} cannot be read ({why}): set --workdir to a run with experts and "
            f"train.ledger_every above 0."
        ) from None
    steps, total, shapes = [], None, None
    # A last line without a newline is still being written.
    finished = itertools.takewhile(lambda line: line.endswith(b"\n"), lines)
    try:
        for number, row in enumerate(records.parse_lines(finished, _counts), 1):
            if shapes not in (None, row.shapes()):
                raise records.LineError(number, "its shapes differ from the lines before")
            shapes = row.shapes()
            if row.step >= from_step:
                steps.append(row.step)
                total = row if total is None else row.after(total)
    except records.LineError as damaged:
        raise UserError(
            f"{path}, line {damaged.number}, is damaged ({damaged}): remove this line."
        ) from None
    if total is None:
        raise UserError(
            f"{path} has no step from {from_step} on: wait for the run, or lower --from_step."
        )
    return Totals(steps, total.sources, total.assignments, total.ledger)


class _Counts(NamedTuple):
    """One row of the file."""

    step: int
    sources: list[str]
    assignments: np.ndarray  # [L]
    ledger: Ledger  # Outcomes of int64 arrays [L, n]

    def shapes(self) -> list[tuple[int, ...]]:
        return [array.shape for array in jax.tree.leaves(self.ledger)]

    def after(self, other: "_Counts") -> "_Counts":
        """The sum of both rows, with the names and the step of this one."""
        ledger = jax.tree.map(np.add, other.ledger, self.ledger)
        return _Counts(self.step, self.sources, other.assignments + self.assignments, ledger)


def _counts(value: Any) -> _Counts:
    """Parse a row, with zeros for the outcomes it leaves out; ValueError if it is not a row."""
    row = records.mapping(value)
    step, sources = records.count(row.get("step")), records.names(row.get("sources"))
    assignments = _whole(row.get("assignments"), 1)
    axes = {}
    for axis in Ledger._fields:
        found = row.get(axis)
        if not isinstance(found, dict) or not found or not found.keys() <= set(Outcomes._fields):
            raise ValueError(f"its counts by {axis} are missing")
        counts = {name: _whole(count, 2) for name, count in found.items()}
        shapes = {count.shape for count in counts.values()}
        if len(shapes) > 1 or {shape[0] for shape in shapes} != {len(assignments)}:
            raise ValueError(f"its counts by {axis} do not have the same layers")
        zeros = np.zeros(shapes.pop(), np.int64)
        axes[axis] = Outcomes(**{name: zeros for name in Outcomes._fields} | counts)
    if axes["source"].kept.shape[1] != len(sources):
        raise ValueError("its counts by source do not match its list of sources")
    return _Counts(step, sources, assignments, Ledger(**axes))


def _whole(value: Any, ndim: int) -> np.ndarray:
    """Parse an array of counts with `ndim` axes; ValueError for anything else."""
    array = np.asarray(value)
    whole = array.ndim == ndim and array.dtype.kind == "i"
    if not whole or not 0 <= array.min() <= array.max() < records.LARGEST:
        raise ValueError("one of its values is not a count")
    return array.astype(np.int64)


def discrepancy(totals: Totals) -> str | None:
    """Describe the first mismatch: outcomes must sum to the assignments, alike on every axis."""
    ledger = totals.ledger
    counted = ledger.expert.total().sum(1)
    if (counted != totals.assignments).any():
        return f"NOT CONSERVED: {totals.assignments} assignments per layer, {counted} counted."
    for outcome in Outcomes._fields:
        sums = {
            axis: getattr(outcomes, outcome).sum(1) for axis, outcomes in ledger._asdict().items()
        }
        for axis, found in sums.items():
            if (found != sums["expert"]).any():
                layer = int(np.argmax(found != sums["expert"]))
                return (
                    f"NOT CONSERVED: layer {layer} has {sums['expert'][layer]} assignments "
                    f"'{_HEADINGS[outcome]}' by expert and {found[layer]} by {axis}."
                )
    return None


def report(totals: Totals, layer: int = -1) -> str:
    """Format the tables; `layer` -1 adds up all layers."""
    ledger = totals.ledger
    first, last = totals.steps[0], totals.steps[-1]
    per_layer = Outcomes(*(count_LE.sum(1) for count_LE in ledger.expert))
    chosen = slice(None) if layer < 0 else slice(layer, layer + 1)
    expert, position, source = (
        Outcomes(*(count_LN[chosen].sum(0) for count_LN in outcomes)) for outcomes in ledger
    )
    buckets = len(position.kept)
    spans = [f"{100 * i // buckets}-{100 * (i + 1) // buckets}%" for i in range(buckets)]
    experts = [str(e) for e in range(len(expert.kept))]
    which = "all layers" if layer < 0 else f"layer {layer}"
    parts = [
        f"{len(totals.steps)} steps from {first} to {last}",
        _table("layer", [str(i) for i in range(len(per_layer.kept))], per_layer),
        f"{which}, by position in the row",
        _table("position", spans, position),
        f"{which}, by data source",
        _table("source", totals.sources, source),
        *_experts(which, experts, expert),
    ]
    return "\n\n".join(parts)


def _experts(which: str, names: list[str], expert: Outcomes) -> Iterator[str]:
    """A table of all experts, or of those with the most drops and the fewest assignments."""
    if len(names) <= WORST:
        yield f"{which}, by expert"
        yield _table("expert", names, expert)
        return
    dropped = expert.sampled() - expert.kept
    for title, order in (
        ("the experts with the most drops", np.argsort(-dropped, kind="stable")),
        ("the experts with the fewest assignments", np.argsort(expert.sampled(), kind="stable")),
    ):
        some = order[: WORST // 2]
        yield f"{which}, {title}, of {len(names)}"
        yield _table(
            "expert", [names[e] for e in some], Outcomes(*(count[some] for count in expert))
        )


def _table(heading: str, names: Sequence[str], outcomes: Outcomes) -> str:
    shown = {
        name: counts for name, counts in outcomes._asdict().items() if name != "dropped_buffer"
    }
    if outcomes.dropped_buffer.any():
        shown["dropped_buffer"] = outcomes.dropped_buffer
    total = outcomes.total()
    rows = [[heading, "assignments", *(_HEADINGS[name] for name in shown)]]
    for i, name in enumerate(names):
        if not total[i]:  # a source that these steps did not read
            continue
        share = (f"{counts[i] / max(1, total[i]):.2%}" for counts in shown.values())
        rows.append([name, f"{total[i]:,}", *share])
    return table(rows, left=1)


def write_csv(path: Path, totals: Totals) -> None:
    """Write one line per layer and expert, position bucket or source.

    Raises:
      UserError: the file cannot be written.
    """
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["axis", "layer", "name", *Outcomes._fields])
            for axis, outcomes in totals.ledger._asdict().items():
                layers, size = outcomes.kept.shape
                names = totals.sources if axis == "source" else range(size)
                for layer in range(layers):
                    for i, name in enumerate(names):
                        writer.writerow(
                            [axis, layer, name, *(count[layer, i] for count in outcomes)]
                        )
    except OSError as error:
        raise UserError(f"--csv={path} cannot be written ({error.strerror}).") from None
