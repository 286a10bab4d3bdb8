"""Where the time of a run went: python -m moe_jax.goodput --workdir=DIR

[--json] [--plot=FILE].  Reads WORKDIR/goodput.jsonl, to which every attempt at the run adds, and
prints the seconds of each category, restarts and lost steps included, and a line for each attempt.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from etils import epath

from moe_jax.goodput.account import read
from moe_jax.goodput.plot import write_plot
from moe_jax.goodput.show import as_json, report
from moe_jax.train import flags
from moe_jax.train.timekeeper import GOODPUT

_FLAGS = (
    flags.Flag("json", False, "Print one line of JSON instead of tables."),
    flags.Flag("plot", "", "Also plot (PNG, SVG or PDF by the name's end); needs matplotlib."),
)


def main(argv: Sequence[str]) -> int:
    """Prints the account; raises UserError where there is none."""
    given = flags.parse(argv, extra=_FLAGS, config=False).flags
    jax.config.update("jax_platforms", "cpu")  # the chips may be busy with the run
    account = read(epath.Path(given.workdir) / GOODPUT)
    print(as_json(account) if given.json else report(account))
    if given.plot:
        write_plot(Path(given.plot), account)
    return 0


def cli() -> None:
    """The console command."""
    flags.run(main)


if __name__ == "__main__":
    sys.exit(cli())
