"""Makes the processes of a run agree about its checkpoints."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_jax.errors import UserError

_LONGEST = 500  # bytes of a message that is sent to the other processes


def lead_decides(action: Callable[[], int | None]) -> int | None:
    """Run `action` on process 0 and return its result on every process; if it raises, all raise."""
    failed, nothing = -2, -1
    code, error = nothing, None
    if jax.process_index() == 0:
        try:
            result = action()
            code = nothing if result is None else result
        except UserError as raised:
            code, error = failed, raised
    if jax.process_count() > 1:
        code = int(multihost_utils.broadcast_one_to_all(np.int32(code)))
    if code == failed:
        raise error or UserError("Process 0 failed to handle its checkpoints: see its message.")
    return None if code == nothing else code


def first_of_all(sentence: str | None) -> str | None:
    """The message of the first process that has one, on every process; None if none has."""
    if jax.process_count() == 1:
        return sentence
    text = (sentence or "").encode()[:_LONGEST]
    mine = np.frombuffer(text.ljust(_LONGEST, b"\0"), np.uint8)
    for row in multihost_utils.process_allgather(mine):
        if row.any():
            return row.tobytes().rstrip(b"\0").decode(errors="replace")
    return None
