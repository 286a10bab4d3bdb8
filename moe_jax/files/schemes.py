"""Accepts local paths and gs:// URLs, and refuses every other URL scheme.

Without this check, a library that does not know a scheme would create a folder named s3://bucket,
or fail with a traceback.
"""

import contextlib
from collections.abc import Iterator

from moe_jax.errors import UserError

REMOTE = "gs://"
_DOWNLOADS = ("ftp", "hf", "http", "https")


def check_scheme(path: str, what: str) -> None:
    """Raise UserError if `path` is a URL other than gs://; `what` names its key or flag."""
    scheme, url, _ = path.partition("://")
    if not url or path.startswith(REMOTE):
        return
    advice = "download it and name" if scheme.lower() in _DOWNLOADS else "use"
    raise UserError(
        f"{what} is {path!r}: {scheme}:// is not supported: {advice} a local path or gs://."
    )


@contextlib.contextmanager
def reach(path: str, what: str) -> Iterator[None]:
    """Raise UserError if the object store's client for `path` is not installed or fails.

    Exceptions for a local path, and FileNotFoundError, pass through unchanged.
    """
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    except ImportError:
        if not path.startswith(REMOTE):
            raise
        raise UserError(
            f"{what}: {path} needs a package that is not installed: pip install gcsfs."
        ) from None
    except Exception as error:  # each store's client has its own exception types
        if not path.startswith(REMOTE):
            raise
        raise UserError(
            f"{what}: {path} cannot be reached ({reason(error)}): check its name and your access."
        ) from None


def reason(error: Exception) -> str:
    """The text of an error on one line of at most 200 characters; its type if it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__
