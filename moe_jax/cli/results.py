"""Print a table of the runs below a folder: python -m moe_jax results --workdir=DIR

[--csv=FILE] [--plot=FILE] [--x=KEY].  Every run is listed; an unfinished or damaged run with what
is wrong.  Means are over runs that differ only in the seed.  Configurations are ranked by held-out
loss if all of them were evaluated on the same sample.
"""

from collections.abc import Sequence
from pathlib import Path

import jax

from moe_jax.cli.commands import COMMANDS
from moe_jax.cli.parse import parse
from moe_jax.errors import one_line
from moe_jax.tools.results.group import group, sample_fault
from moe_jax.tools.results.plot import write_plot
from moe_jax.tools.results.read import read_runs
from moe_jax.tools.results.table import NOTE, groups_table, runs_table, write_csv


def main(argv: Sequence[str]) -> int:
    """Print the tables and write the files; raises UserError if there is no run."""
    given = parse(argv, COMMANDS["results"]).flags
    jax.config.update("jax_platforms", "cpu")  # the chips may be busy with the runs
    results = read_runs(Path(given.workdir))
    groups = group(results)
    print(runs_table(results))
    if groups:
        print(f"\n{groups_table(groups)}")
    print(f"\n{NOTE}")
    fault = sample_fault(groups)
    if fault:
        print(f"\n{one_line(fault)}")
    if given.csv:
        write_csv(Path(given.csv), results)
    if given.plot:
        write_plot(Path(given.plot), groups, given.x)
    return 0
