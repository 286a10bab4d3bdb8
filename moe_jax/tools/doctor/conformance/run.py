"""Runs the cells and prints their errors."""

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from moe_jax.errors import UserError
from moe_jax.tools.doctor.conformance import cases
from moe_jax.tools.doctor.conformance.cells import Cell, all_cells, pairwise
from moe_jax.tools.doctor.conformance.compare import TOLERANCES, Error, worst
from moe_jax.tools.doctor.conformance.oracle import expected
from moe_jax.tools.doctor.conformance.reference import REFERENCE
from moe_jax.tools.doctor.conformance.subject import compiled


class Verdict(NamedTuple):
    """The largest error of a cell."""

    cell: Cell
    error: Error
    scenario: str
    tolerance: float

    @property
    def passed(self) -> bool:
        """True if the error is within the tolerance."""
        return self.error.relative <= self.tolerance


def run_cell(cell: Cell) -> Verdict:
    """Run all scenarios through one layer."""
    layer = cases.layer(*cell)
    step = compiled(layer)
    found = {
        name: worst(step(case), expected(layer, case))
        for name, case in cases.scenarios(layer.model).items()
    }
    scenario = max(found, key=lambda name: found[name].relative)
    return Verdict(cell, found[scenario], scenario, TOLERANCES[jax.default_backend(), cell.dtype])


def main_conformance(full: bool, say: Callable[[str], None]) -> int:
    """Run cells that cover every pair of values, or all with `full`; return 1 if any fails.

    Prints a line when a cell is done, and at the end a table of all cells.
    """
    cells = present(all_cells(), jax.device_count(), say)
    cells = cells if full else pairwise(cells)
    for name in sorted({cell.router for cell in cells} - set(REFERENCE)):
        say(f"router {name} has no reference formulas: compared with its own route in float64")
    say(f"{len(cells)} cells of {len(cases.SCENARIOS)} scenarios on {jax.default_backend()}")
    verdicts = []
    for number, cell in enumerate(cells, 1):
        started = time.perf_counter()
        verdict = _run_or_fail(cell)
        verdicts.append(verdict)
        seconds = time.perf_counter() - started
        say(f"{number}/{len(cells)} {cell}: {_word(verdict)} ({seconds:.1f} s)")
    for line in table(verdicts):
        say(line)
    return 0 if all(verdict.passed for verdict in verdicts) else 1


def present(cells: Sequence[Cell], devices: int, say: Callable[[str], None]) -> list[Cell]:
    """The cells that need at most `devices` devices; `say` gets a line per mesh left out."""
    for mesh in dict.fromkeys(cell.mesh for cell in cells if cell.devices > devices):
        needed = next(cell.devices for cell in cells if cell.mesh == mesh)
        say(
            f"mesh {mesh} left out: it needs {needed} devices and there are {devices} "
            f"(--devices={needed} makes virtual ones)"
        )
    return [cell for cell in cells if cell.devices <= devices]


def table(verdicts: Sequence[Verdict]) -> list[str]:
    """Format one line per cell: values, worst error, tolerance, quantity and scenario."""
    head = ("", *Cell._fields, "worst error", "allowed", "quantity", "scenario")
    rows: list[tuple[str, ...]] = [head]
    for verdict in verdicts:
        cell, error = verdict.cell, verdict.error
        names = (cell.router, cell.dispatch, cell.mesh, cell.dtype, "on" if cell.remat else "off")
        figures = (f"{error.relative:.1e}", f"{verdict.tolerance:.0e}")
        rows.append((_word(verdict), *names, *figures, error.quantity, verdict.scenario))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    failed = sum(not verdict.passed for verdict in verdicts)
    return [*lines, f"{len(verdicts) - failed} of {len(verdicts)} cells pass"]


def _run_or_fail(cell: Cell) -> Verdict:
    """Run a cell; an exception is a failure of this cell only."""
    try:
        return run_cell(cell)
    except UserError:
        raise
    except Exception as error:
        lines = str(error).splitlines() or [""]
        return Verdict(cell, Error(f"{type(error).__name__}: {lines[0]}", math.inf), "-", 0.0)


def _word(verdict: Verdict) -> str:
    return "pass" if verdict.passed else "FAIL"
