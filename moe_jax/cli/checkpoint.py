"""Lists the checkpoints of a run: `python -m moe_jax checkpoint --workdir=DIR [--verify]`.

One line a step on stdout, oldest first: step, state, size.  The state is `complete` where all files
are there in their sizes, else `bad:` with the reason.  With --verify every byte is read, the state
is `ok` or `bad:`, and last stands the SHA-256 of the parameters (`-` where the step is bad), which
does not depend on the mesh.  The exit code is 1 if any step is bad.  Steps in quarantine go to
stderr.  Nothing is changed.

Anybody may have written the folder: only regular files that a manifest lists are opened, what
arrays declare must fit the files before one is read, and a step that is read slower than 1 MiB/s
ends the command.
"""

import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import jax

from moe_jax.checkpoint import QUARANTINE, Checkpoints
from moe_jax.checkpoint.manifest import seconds_to_read
from moe_jax.cli.commands import COMMANDS
from moe_jax.cli.parse import parse
from moe_jax.errors import UserError
from moe_jax.files import formats
from moe_jax.parallel.distributed import DONE, FIX

T = TypeVar("T")


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
        size = checkpoints.size(step)
        state, last = "complete", ""
        if given.verify:
            reason, digest = _in_time(lambda step=step: _verify(checkpoints, step), step, size)
            state, last = "ok", f"  {digest}"
        else:
            reason = checkpoints.incomplete(step)
        if reason is not None:
            state, code = f"bad: {reason}", FIX
        print(f"step {step}  {state}  {formats.size(size, 1)}{last}", flush=True)
    for name in checkpoints.quarantined():
        print(f"set aside: {checkpoints.root / QUARANTINE / name}", file=sys.stderr)
    return code


def _verify(checkpoints: Checkpoints, step: int) -> tuple[str | None, str]:
    """(why a step is bad, -) or (None, the digest of its parameters)."""
    reason = checkpoints.examine(step)
    if reason is not None:
        return reason, "-"
    try:
        return None, checkpoints.digest(step)
    except UserError as error:
        return str(error), "-"


def _in_time(read: Callable[[], T], step: int, size: int) -> T:
    """What `read` returns; a file system that does not answer would hang it for ever.

    Raises:
      UserError: it takes longer than `seconds_to_read(size)`.
    """
    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(read())
        except BaseException as error:
            found.set_exception(error)

    # A daemon, which the end of the process does not wait for.
    threading.Thread(target=run, name="verify", daemon=True).start()
    limit = seconds_to_read(size)
    try:
        return found.result(limit)
    except TimeoutError:
        raise UserError(
            f"Step {step} was not read within {limit:.0f} s, in which {formats.size(size, 1)} can "
            f"be read at 1 MiB/s: check the file system, or copy the step to another."
        ) from None
