"""Lists the checkpoints of a run: `python -m moe_jax.checkpoint --workdir=DIR`.

One line a step on stdout, oldest first: step, whether it verifies, size, and last the SHA-256 of
the parameters (`-` where the step is bad), which does not depend on the mesh.  Steps in quarantine
go to stderr.  Nothing is changed.
"""

import os
import sys
from collections.abc import Sequence

import jax

from moe_jax.checkpoint.store import QUARANTINE, Checkpoints
from moe_jax.errors import UserError
from moe_jax.train import flags


def main(argv: Sequence[str]) -> int:
    """Prints the lines; raises UserError where there is no checkpoint."""
    parsed = flags.parse(argv, config=False)
    jax.config.update("jax_platforms", "cpu")  # the chips may be busy with the run
    checkpoints = Checkpoints(os.path.join(parsed.flags.workdir, "checkpoints"))
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"{checkpoints.root} holds no checkpoint: check --workdir.")
    for step in steps:
        reason = checkpoints.verify(step)
        state = "ok" if reason is None else f"bad: {reason}"
        digest = checkpoints.digest(step) if reason is None else "-"
        size = checkpoints.size(step) / 2**20
        print(f"step {step}  {state}  {size:.1f} MiB  {digest}", flush=True)
    for name in checkpoints.quarantined():
        print(f"set aside: {checkpoints.root / QUARANTINE / name}", file=sys.stderr)
    return 0


def cli() -> None:
    """Entry point of the console command."""
    flags.run(main)


if __name__ == "__main__":
    cli()
