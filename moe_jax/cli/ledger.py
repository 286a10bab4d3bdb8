"""Show the outcomes of a run's assignments: python -m moe_jax ledger --workdir=DIR

[--layer=N] [--from_step=N] [--csv=FILE].  Reads WORKDIR/ledger.jsonl, which holds the counts of
every `train.ledger_every`-th step, and prints them by layer, expert, position in the row and data
source.  Shares are fractions of the line's own assignments.  Exits 1 if the counts do not add up.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
from etils import epath

from moe_jax.cli.commands import COMMANDS
from moe_jax.cli.parse import parse
from moe_jax.errors import UserError
from moe_jax.record.report import LEDGER
from moe_jax.tools.ledger import discrepancy, read, report, write_csv


def main(argv: Sequence[str]) -> int:
    """Print the tables; return 1 if the counts by expert, position and source differ."""
    given = parse(argv, COMMANDS["ledger"]).flags
    jax.config.update("jax_platforms", "cpu")  # the chips may be busy with the run
    if given.from_step < 0:
        raise UserError(f"--from_step={given.from_step}: give 0 or more.")
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
