"""Show how a run spent its time: python -m moe_jax goodput --workdir=DIR [--json] [--plot=FILE]

Reads WORKDIR/goodput.jsonl, to which every attempt appends, and prints the seconds of each category
(including restarts and lost steps) and one line per attempt.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
from etils import epath

from moe_jax.cli.commands import COMMANDS
from moe_jax.cli.parse import parse
from moe_jax.tools.goodput.account import read
from moe_jax.tools.goodput.plot import write_plot
from moe_jax.tools.goodput.show import as_json, report
from moe_jax.watch.timekeeper import GOODPUT


def main(argv: Sequence[str]) -> int:
    """Print the account; raises UserError if the run has none."""
    given = parse(argv, COMMANDS["goodput"]).flags
    jax.config.update("jax_platforms", "cpu")  # the chips may be busy with the run
    account = read(epath.Path(given.workdir) / GOODPUT)
    print(as_json(account) if given.json else report(account))
    if given.plot:
        write_plot(Path(given.plot), account)
    return 0
