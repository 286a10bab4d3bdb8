"""Lists the checkpoints of a run: `python -m moe_jax checkpoint --workdir=DIR [--verify]`.

One line a step on stdout, oldest first: step, state, size.  The state is `complete` where all files
are there in their sizes, else `bad:` with the reason.  With --verify every byte is read, the state
is `ok` or `bad:`, and last stands the SHA-256 of the parameters (`-` where the step is bad), which
does not depend on the mesh.  The exit code is 1 if any step is bad.  Steps in quarantine go to
stderr.  Nothing is changed.
"""

import os
import sys
from collections.abc import Sequence

import jax

from moe_jax.checkpoint import QUARANTINE, Checkpoints
from moe_jax.cli.commands import COMMANDS
from moe_jax.cli.parse import parse
from moe_jax.errors import UserError
from moe_jax.files import formats
from moe_jax.parallel.distributed import DONE, FIX


def main(argv: Sequence[str]) -> int:
    """Prints the lines; raises UserError where there is no checkpoint."""
    given = parse(argv, COMMANDS["checkpoint"]).flags
    jax.config.update("jax_platforms", "cpu")  # the chips may be busy with the run
    checkpoints = Checkpoints(os.path.join(given.workdir, "checkpoints"))
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"{checkpoints.root} holds no checkpoint: check --workdir.")
    code = DONE
    for step in steps:
        reason = checkpoints.verify(step) if given.verify else checkpoints.incomplete(step)
        state, last = "ok" if given.verify else "complete", ""
        if reason is not None:
            state, code = f"bad: {reason}", FIX
        if given.verify:
            last = f"  {checkpoints.digest(step) if reason is None else '-'}"
        print(f"step {step}  {state}  {formats.size(checkpoints.size(step), 1)}{last}", flush=True)
    for name in checkpoints.quarantined():
        print(f"set aside: {checkpoints.root / QUARANTINE / name}", file=sys.stderr)
    return code
