"""The sentence for a file that cannot be written."""

import errno

from moe_jax.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota, the largest file allowed


def reason(error: OSError) -> str:
    """What went wrong, in a few words, without the path."""
    return error.strerror or str(error) or type(error).__name__


def cannot_write(what: object, error: OSError, advice: str) -> UserError:
    """The error for `what`, a path or a flag with its value.

    Args:
      what: subject of the sentence.
      error: raised by the write.
      advice: what to change, unless the error itself says so (a full disk, a name too long).
    """
    if error.errno in FULL:
        advice = "make room, then run the same command again"
    elif error.errno == errno.ENAMETOOLONG:
        advice = "choose a shorter path"
    return UserError(f"{what} cannot be written ({reason(error)}): {advice}.")
