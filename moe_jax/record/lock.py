"""One live run to a workdir."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from typing import TextIO

from moe_jax.errors import UserError
from moe_jax.files.workdir import Folder, is_remote
from moe_jax.files.write_errors import cannot_write, reason

LOCK = "lock"


class Lock:
    """WORKDIR/lock in the hands of this process; an object store has none."""

    def __init__(self, path: Folder | None, file: TextIO | None):
        self._path, self._file = path, file

    def check(self) -> None:
        """Raises UserError where the file was removed or replaced: another run may be here."""
        if not self.held():
            raise UserError(
                f"{self._path} was removed or replaced while this run held it, so another one may "
                f"be training there: see that none does, then run the same command again."
            )

    def held(self) -> bool:
        """Whether the file of that name is still the one that this process has locked."""
        if self._path is None or self._file is None:
            return True
        mine = os.fstat(self._file.fileno())
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            return False
        except OSError:
            return True  # it cannot be told: a file system that does not answer is no other run
        return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)


@contextlib.contextmanager
def alone_in(workdir: Folder, say: Callable[[str], None] = print) -> Iterator[Lock]:
    """Holds WORKDIR/lock, which the kernel lets go of when the process dies, however it dies.

    The file stays, and says who holds it.  Only where the run ends before it has written anything
    else into a folder that was made here, the folder goes as well; so whoever gets a lock looks
    whether the file still has its name.  An object store has no locks: there nothing is held and
    nothing promised.  On a local file system without locks neither, and one line to `say` tells so.

    Raises:
      UserError: another live process trains here, or the folder cannot be written.
    """
    if is_remote(workdir):
        yield Lock(None, None)
        return
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    while True:
        with _opened(workdir) as file:
            _take(file, workdir, say)
            lock = Lock(workdir / LOCK, file)
            if not lock.held():  # who held it before has removed it
                continue
            _sign(file)
            try:
                yield lock
            except BaseException:
                if made and lock.held() and os.listdir(workdir) == [LOCK]:
                    (workdir / LOCK).unlink()
                    with contextlib.suppress(OSError):  # others may have come to need it
                        for folder in made:
                            folder.rmdir()
                raise
            return


def _opened(workdir: Folder) -> TextIO:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        return open(workdir / LOCK, "a+")
    except OSError as error:
        advice = "choose another folder or change its permissions"
        raise cannot_write(f"--workdir={workdir}", error, advice) from None


def _take(file: TextIO, workdir: Folder, say: Callable[[str], None]) -> None:
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


def _sign(file: TextIO) -> None:
    """Writes who holds the lock, which only another run's sentence needs: a full disk is none."""
    with contextlib.suppress(OSError):
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
