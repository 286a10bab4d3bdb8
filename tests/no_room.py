"""Makes the disk look full to this process for a while."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def no_room(leave: int = 0) -> Iterator[None]:
    """Limit files to `leave` bytes: a write stops there, and the next one fails (EFBIG).

    The kernel enforces the limit, also for native code.  Use `capsys` in the test: otherwise pytest
    redirects standard output to a file, which the limit would affect.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (leave, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
