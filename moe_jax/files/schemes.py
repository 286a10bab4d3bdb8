"""Paths that are URLs: local paths and gs:// are read and written, other schemes are refused.

A library that does not know a scheme takes s3://bucket for a folder of that name, or fails with a
traceback of its own.
"""

import contextlib
from collections.abc import Iterator

from moe_jax.errors import UserError

REMOTE = "gs://"
_DOWNLOADS = ("ftp", "hf", "http", "https")


def check_scheme(path: str, what: str) -> None:
    """Raises UserError where `path` is a URL that is not gs://; `what` names its key or flag."""
    scheme, url, _ = path.partition("://")
    if not url or path.startswith(REMOTE):
        return
    advice = "download it and name" if scheme.lower() in _DOWNLOADS else "use"
    raise UserError(
        f"{what} is {path!r}: {scheme}:// is not supported: {advice} a local path or gs://."
    )


@contextlib.contextmanager
def reach(path: str, what: str) -> Iterator[None]:
    """Raises UserError where the client of the object store of `path` is not here, or fails.

    What a local path raises, and a file that is missing, passes through.
    """
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    except ImportError:
        if not path.startswith(REMOTE):
            raise
        raise UserError(
            f"{what}: {path} needs a package that is not here: pip install gcsfs."
        ) from None
    except Exception as error:  # of whichever client the store has
        if not path.startswith(REMOTE):
            raise
        raise UserError(
            f"{what}: {path} cannot be reached ({reason(error)}): check its name and your access."
        ) from None


def reason(error: Exception) -> str:
    """What an error says, on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__
