"""List the checkpoints of a run: `python -m moe_jax checkpoint --workdir=DIR [--verify]`.

Prints one line per step, oldest first: step, state, size.  The state is `complete` if all files
exist with the sizes in the manifest, else `bad:` with the reason.  With --verify every byte is
read, the state is `ok` or `bad:`, and the line ends with the SHA-256 of the parameters (`-` if the
step is bad), which does not depend on the mesh.  The exit code is 1 if any step is bad.  Steps in
quarantine are listed on stderr.  Nothing is changed.

The workdir is untrusted: only regular files that a manifest lists are opened, the sizes that arrays
declare are compared with the files before any array is read, and the command ends if a step is read
slower than 1 MiB/s.
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
    """Print the lines; raises UserError if there is no checkpoint."""
    given = parse(argv, COMMANDS["checkpoint"]).flags
    jax.config.update("jax_platforms", "cpu")  # the chips may be busy with the run
    checkpoints = Checkpoints(os.path.join(given.workdir, "checkpoints"))
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"{checkpoints.root} has no checkpoints: check --workdir.")
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
        print(f"quarantined: {checkpoints.root / QUARANTINE / name}", file=sys.stderr)
    return code


def _verify(checkpoints: Checkpoints, step: int) -> tuple[str | None, str]:
    """Return (why the step is bad, "-"), or (None, the digest of its parameters)."""
    reason = checkpoints.examine(step)
    if reason is not None:
        return reason, "-"
    try:
        return None, checkpoints.digest(step)
    except UserError as error:
        return str(error), "-"


def _in_time(read: Callable[[], T], step: int, size: int) -> T:
    """Call `read` with a time limit, because a file system may never answer.

    Raises:
      UserError: it takes longer than `seconds_to_read(size)`.
    """
    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(read())
        except BaseException as error:
            found.set_exception(error)

    # A daemon thread, because the process must be able to end before it.
    threading.Thread(target=run, name="verify", daemon=True).start()
    limit = seconds_to_read(size)
    try:
        return found.result(limit)
    except TimeoutError:
        raise UserError(
            f"Step {step} ({formats.size(size, 1)}) was not read within {limit:.0f} s, which is "
            f"slower than 1 MiB/s: check the file system, or copy the step to a faster one."
        ) from None
