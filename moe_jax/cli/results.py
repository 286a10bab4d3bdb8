"""Print a table of the runs below a folder: python -m moe_jax results --workdir=DIR

[--csv=FILE] [--plot=FILE] [--x=KEY].  Every run is listed; an unfinished or damaged run with what
is wrong.  Means are over runs that differ only in the seed.  Configurations are ranked by held-out
loss if all of them were evaluated on the same sample.  --compare=RUN instead prints speed-ups until
the final loss of a baseline, --fit=LAW the scaling law of the runs; --plot then shows these.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from moe_jax.cli.commands import COMMANDS
from moe_jax.cli.parse import parse
from moe_jax.errors import UserError, one_line
from moe_jax.tools.results.compare import compare, with_baseline
from moe_jax.tools.results.compare_plot import write_compare_plot
from moe_jax.tools.results.compare_table import comparison_text
from moe_jax.tools.results.fit_plot import write_fit_plot
from moe_jax.tools.results.fit_runs import fit_runs
from moe_jax.tools.results.fit_text import fit_text
from moe_jax.tools.results.group import group, sample_fault
from moe_jax.tools.results.laws import Saturation
from moe_jax.tools.results.plot import write_plot
from moe_jax.tools.results.read import Result, read_runs
from moe_jax.tools.results.table import NOTE, groups_table, runs_table, write_csv


def main(argv: Sequence[str]) -> int:
    """Print the tables and write the files; raises UserError if there is no run."""
    given = parse(argv, COMMANDS["results"]).flags
    _check(given)
    jax.config.update("jax_platforms", "cpu")  # the chips may be busy with the runs
    results = read_runs(Path(given.workdir))
    if given.compare:
        _compare(given, results)
    elif given.fit:
        _fit(given, results)
    else:
        _list(given, results)
    if given.csv:
        write_csv(Path(given.csv), results)
    return 0


def _check(given: Any) -> None:
    """Raise UserError for flags that exclude each other."""
    if given.compare and given.fit:
        raise UserError("--compare and --fit are two reports: give one of them.")
    if given.x and (given.compare or given.fit):
        raise UserError(f"--x={given.x} is for the plot without --compare and --fit: leave it out.")


def _list(given: Any, results: Sequence[Result]) -> None:
    groups = group(results)
    print(runs_table(results))
    if groups:
        print(f"\n{groups_table(groups)}")
    print(f"\n{NOTE}")
    fault = sample_fault(groups)
    if fault:
        print(f"\n{one_line(fault)}")
    if given.plot:
        write_plot(Path(given.plot), groups, given.x)


def _compare(given: Any, results: Sequence[Result]) -> None:
    everything, name = with_baseline(results, Path(given.workdir), Path(given.compare))
    whole = compare(everything, name)
    print(comparison_text(whole))
    if given.plot:
        write_compare_plot(Path(given.plot), whole)


def _fit(given: Any, results: Sequence[Result]) -> None:
    report = fit_runs(results, given.fit, Saturation(given.fit_e_start, given.fit_e_max))
    print(fit_text(report))
    if given.plot:
        write_fit_plot(Path(given.plot), report)
