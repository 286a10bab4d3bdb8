"""One live run to a workdir."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable, Iterator

from moe_jax.errors import UserError
from moe_jax.files.workdir import Folder, is_remote
from moe_jax.files.write_errors import cannot_write, reason

LOCK = "lock"


@contextlib.contextmanager
def alone_in(workdir: Folder, say: Callable[[str], None] = print) -> Iterator[None]:
    """Holds WORKDIR/lock, which the kernel lets go of when the process dies, however it dies.

    The file stays: deleting it would let two runs hold locks on two files of one name.  It says
    who holds it.  An object store has no locks: there nothing is held and nothing promised.  On a
    local file system without locks neither, and one line to `say` tells so.

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
        advice = "choose another folder or change its permissions"
        raise cannot_write(f"--workdir={workdir}", error, advice) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"--workdir={workdir} is in use by {file.read().strip() or 'another process'}: "
                f"wait for it or stop it, or choose another folder."
            ) from None
        except OSError as error:
            say(
                f"{workdir} lies on a file system without locks ({reason(error)}): nothing keeps a "
                f"second run out of it, so start one at a time."
            )
        with contextlib.suppress(OSError):  # a full disk; only the other run's sentence needs it
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
