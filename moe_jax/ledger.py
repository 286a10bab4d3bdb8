"""Where a run's assignments went: python -m moe_jax.ledger --workdir=DIR

[--layer=N] [--from_step=N] [--csv=FILE].  Reads WORKDIR/ledger.jsonl, which holds the counts of
every `train.ledger_every`-th step, and prints them by layer, expert, position in the row and data
source; every share is of the line's own assignments.  Exits 1 where they do not add up.
"""

import csv
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from moe_jax.errors import UserError
from moe_jax.markdown import table
from moe_jax.model.moe.types import Fates, Ledger
from moe_jax.train import flags
from moe_jax.train.report import LEDGER
from moe_jax.train.workdir import Folder

_FLAGS = (
    flags.Flag("layer", -1, "Only this MoE layer, counted from 0; -1: all of them, added."),
    flags.Flag("from_step", 0, "Leave out earlier steps."),
    flags.Flag("csv", "", "Also write every count here: axis, layer, name and the fates."),
)
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
    """Counts of some steps of a run, added."""

    steps: list[int]
    sources: list[str]
    assignments: np.ndarray  # [L], from the shapes of the choices
    ledger: Ledger  # Fates of int64 arrays [L, n]


def main(argv: Sequence[str]) -> int:
    """Prints the tables; returns 1 where the three ways of counting differ."""
    given = flags.parse(argv, extra=_FLAGS, config=False).flags
    jax.config.update("jax_platforms", "cpu")  # the chips may be busy with the run
    path = epath.Path(given.workdir) / LEDGER
    totals = read(path, given.from_step)
    layers = len(totals.ledger.expert.kept)
    if not -1 <= given.layer < layers:
        raise UserError(f"--layer={given.layer}: {path} has MoE layers 0 to {layers - 1}.")
    print(report(totals, given.layer))
    if given.csv:
        write_csv(Path(given.csv), totals)
    problem = discrepancy(totals)
    print(f"\n{problem or 'Every assignment is in exactly one column, on every axis.'}")
    return 1 if problem else 0


def read(path: Folder, from_step: int = 0) -> Totals:
    """The counts of all rows from `from_step` on.

    Raises:
      UserError: no such file, a damaged line, or no row.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not text"
        raise UserError(
            f"{path} cannot be read ({why}): name the workdir of a run with experts and "
            f"train.ledger_every above 0."
        ) from None
    steps, sources, ledger, assignments = [], [], None, np.zeros((), np.int64)
    for number, line in enumerate(lines[:-1], 1):  # a line without its end is still being written
        try:
            row = json.loads(line)
            step, names, found = row["step"], row["sources"], _parse(row)
            if step < from_step:
                continue
            assignments = assignments + np.asarray(row["assignments"], np.int64)
            ledger = found if ledger is None else jax.tree.map(np.add, ledger, found)
        except (ValueError, KeyError, TypeError, StopIteration, RecursionError):
            raise UserError(
                f"{path}, line {number}, is damaged: remove that line to see the others."
            ) from None
        steps.append(step)
        sources = names
    if ledger is None:
        raise UserError(f"{path} has no step from {from_step} on: the run has not got that far.")
    return Totals(steps, sources, assignments, ledger)


def _parse(row: dict[str, Any]) -> Ledger:
    """A row's counts, zeros for the fates it leaves out."""
    axes = {}
    for axis in Ledger._fields:
        found = {name: np.asarray(row[axis][name], np.int64) for name in row[axis]}
        zeros = np.zeros_like(next(iter(found.values())))
        axes[axis] = Fates(**{name: zeros for name in Fates._fields} | found)
    return Ledger(**axes)


def discrepancy(totals: Totals) -> str | None:
    """What does not add up: all fates to the assignments, each fate to the same on every axis."""
    ledger = totals.ledger
    counted = ledger.expert.total().sum(1)
    if (counted != totals.assignments).any():
        return f"NOT CONSERVED: {totals.assignments} assignments a layer, {counted} accounted for."
    for fate in Fates._fields:
        sums = {axis: getattr(fates, fate).sum(1) for axis, fates in ledger._asdict().items()}
        for axis, found in sums.items():
            if (found != sums["expert"]).any():
                layer = int(np.argmax(found != sums["expert"]))
                return (
                    f"NOT CONSERVED: layer {layer} has {sums['expert'][layer]} assignments "
                    f"'{_HEADINGS[fate]}' by expert and {found[layer]} by {axis}."
                )
    return None


def report(totals: Totals, layer: int = -1) -> str:
    """The tables as text."""
    ledger = totals.ledger
    first, last = totals.steps[0], totals.steps[-1]
    per_layer = Fates(*(count_LE.sum(1) for count_LE in ledger.expert))
    chosen = slice(None) if layer < 0 else slice(layer, layer + 1)
    expert, position, source = (
        Fates(*(count_LN[chosen].sum(0) for count_LN in fates)) for fates in ledger
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


def _experts(which: str, names: list[str], expert: Fates) -> Iterator[str]:
    """All experts, or those that dropped most and those that were chosen least."""
    if len(names) <= WORST:
        yield f"{which}, by expert"
        yield _table("expert", names, expert)
        return
    dropped = expert.wanted() - expert.kept
    for title, order in (
        ("the experts that dropped most", np.argsort(-dropped, kind="stable")),
        ("the experts chosen least", np.argsort(expert.wanted(), kind="stable")),
    ):
        some = order[: WORST // 2]
        yield f"{which}, {title}, of {len(names)}"
        yield _table("expert", [names[e] for e in some], Fates(*(count[some] for count in expert)))


def _table(heading: str, names: Sequence[str], fates: Fates) -> str:
    shown = {name: counts for name, counts in fates._asdict().items() if name != "dropped_buffer"}
    if fates.dropped_buffer.any():
        shown["dropped_buffer"] = fates.dropped_buffer
    total = fates.total()
    rows = [[heading, "assignments", *(_HEADINGS[name] for name in shown)]]
    for i, name in enumerate(names):
        if not total[i]:  # a source that these steps did not read
            continue
        share = (f"{counts[i] / max(1, total[i]):.2%}" for counts in shown.values())
        rows.append([name, f"{total[i]:,}", *share])
    return table(rows, left=1)


def write_csv(path: Path, totals: Totals) -> None:
    """One line for each layer and expert, position bucket or source.

    Raises:
      UserError: the file cannot be written.
    """
    try:
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["axis", "layer", "name", *Fates._fields])
            for axis, fates in totals.ledger._asdict().items():
                layers, size = fates.kept.shape
                names = totals.sources if axis == "source" else range(size)
                for layer in range(layers):
                    for i, name in enumerate(names):
                        writer.writerow([axis, layer, name, *(count[layer, i] for count in fates)])
    except OSError as error:
        raise UserError(f"--csv={path} cannot be written ({error.strerror}).") from None


def cli() -> None:
    """The console command."""
    flags.run(main)


if __name__ == "__main__":
    sys.exit(cli())
