"""Table of the runs below a folder: python -m moe_jax.results --workdir=DIR

[--csv=FILE] [--plot=FILE] [--x=KEY].  Every run is listed; one that has not come to its end, or
whose files are damaged, with what is wrong.  Means are over runs that differ in their seed alone.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from moe_jax.results.group import group
from moe_jax.results.plot import write_plot
from moe_jax.results.read import read_runs
from moe_jax.results.table import NOTE, groups_table, runs_table, write_csv
from moe_jax.train import flags

_FLAGS = (
    flags.Flag("csv", "", "Also write the table of runs here, numbers in full."),
    flags.Flag("plot", "", "Also plot (PNG, SVG or PDF by the name's end); needs matplotlib."),
    flags.Flag("x", "", "Config key for the plot's right panel, such as optimizer.learning_rate."),
)


def main(argv: Sequence[str]) -> int:
    """Prints the tables and writes the files; raises UserError where there is no run."""
    given = flags.parse(argv, extra=_FLAGS, config=False).flags
    jax.config.update("jax_platforms", "cpu")  # the chips may be busy with the runs
    results = read_runs(Path(given.workdir))
    groups = group(results)
    print(runs_table(results))
    if groups:
        print(f"\n{groups_table(groups)}")
    print(f"\n{NOTE}")
    if given.csv:
        write_csv(Path(given.csv), results)
    if given.plot:
        write_plot(Path(given.plot), groups, given.x)
    return 0


def cli() -> None:
    """The console command."""
    flags.run(main)


if __name__ == "__main__":
    sys.exit(cli())
