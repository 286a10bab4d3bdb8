"""One live run to a workdir."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator

from moe_jax.errors import UserError
from moe_jax.files.workdir import Folder, is_remote

LOCK = "lock"


@contextlib.contextmanager
def alone_in(workdir: Folder) -> Iterator[None]:
    """Holds WORKDIR/lock, which the kernel lets go of when the process dies, however it dies.

    The file stays: deleting it would let two runs hold locks on two files of one name.  It says
    who holds it.  An object store has no locks: there nothing is held and nothing promised.

    Raises:
      UserError: another live process trains here, or the folder cannot be written.
    """
    if is_remote(workdir):
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / LOCK, "a+")  # noqa: SIM115
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
