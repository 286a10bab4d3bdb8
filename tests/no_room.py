"""A disk that is full for a while, as this process sees it."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def no_room(leave: int = 0) -> Iterator[None]:
    """No file may grow beyond `leave` bytes: a write stops there, and the next one fails (EFBIG).

    The kernel does it, to native code as well.  Standard output must not be a file meanwhile, which
    pytest makes of it: take `capsys`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (leave, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
