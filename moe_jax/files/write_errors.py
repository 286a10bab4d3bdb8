"""Builds the UserError for a file that cannot be written."""

import errno

from moe_jax.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota reached, file too large


def reason(error: OSError) -> str:
    """The cause of `error` in a few words, without the path."""
    return error.strerror or str(error) or type(error).__name__


def cannot_write(what: object, error: OSError, advice: str) -> UserError:
    """The UserError for a failed write of `what`.

    Args:
      what: subject of the sentence: a path, or a flag with its value.
      error: the exception that the write raised.
      advice: what to change; replaced if the error implies the advice (disk full, name too long).
    """
    if error.errno in FULL:
        advice = "make room, then run the same command again"
    elif error.errno == errno.ENAMETOOLONG:
        advice = "choose a shorter path"
    return UserError(f"{what} cannot be written ({reason(error)}): {advice}.")
