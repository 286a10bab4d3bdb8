"""One live run to a workdir."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from moe_jax.errors import UserError

LOCK = "lock"


@contextlib.contextmanager
def alone_in(workdir: Path) -> Iterator[None]:
    """Holds WORKDIR/lock, which the kernel lets go of when the process dies, however it dies.

    The file stays: deleting it would let two runs hold locks on two files of one name.  It says
    who holds it.

    Raises:
      UserError: another live process trains here, or the folder cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK).open("a+")
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be written ({error.strerror or error}): choose another "
            f"folder or change its permissions."
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"--workdir={workdir} is in use by {file.read().strip() or 'another process'}: "
                f"wait for it or stop it, or choose another folder."
            ) from None
        except OSError:
            pass  # a file system without locks: nothing can be promised there
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
