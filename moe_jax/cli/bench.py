"""python -m moe_jax bench --config=...: measure how fast a config trains on these devices.

Prints one line of JSON.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from moe_jax.cli.commands import COMMANDS
from moe_jax.cli.parse import parse
from moe_jax.config import from_config_dict
from moe_jax.errors import UserError
from moe_jax.files.workdir import locate
from moe_jax.parallel.host_memory import keep_freed_memory
from moe_jax.run.loop import start_lowering
from moe_jax.run.restore import restore_or_init_state
from moe_jax.run.setup import prepare, set_numerics
from moe_jax.tools.bench.breakdown import breakdown_table
from moe_jax.tools.bench.measure import measure
from moe_jax.tools.bench.random_rows import random_rows


def main(argv: Sequence[str]) -> int:
    """Train some steps on the config's own data and print their speed; only the store is kept."""
    parsed = parse(argv, COMMANDS["bench"])
    if parsed.flags.steps < 1:
        raise UserError(f"--steps={parsed.flags.steps}: give 1 or more.")
    keep_freed_memory()
    config = from_config_dict(parsed.config)
    set_numerics(config)
    workdir = locate(parsed.flags.workdir or str(Path.home() / ".cache" / "moe_jax" / "bench"))
    run = prepare(config, workdir, _progress)
    lowered = start_lowering(run)
    given, state = parsed.flags, restore_or_init_state(run, "", _progress)
    rows = random_rows(run.config) if given.random else run.batches.rows
    row = measure(run, state, lowered, rows, given.steps, given.gradients, given.profile)
    if given.profile:
        _progress(breakdown_table(row["profile_ms"]))
        if row["collectives_hidden_ms"]:
            _progress(f"collectives hidden: {row['collectives_hidden_ms']:.2f} ms beside kernels")
    print(json.dumps({"config": parsed.flags.config, **row}), flush=True)
    return 0


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
