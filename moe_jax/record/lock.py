"""Locks a workdir, so that only one run trains in it at a time."""

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
    """The lock on WORKDIR/lock held by this process; a workdir in an object store has none."""

    def __init__(self, path: Folder | None, file: TextIO | None):
        self._path, self._file = path, file

    def check(self) -> None:
        """Raise UserError if the file was removed or replaced: another run may be training here."""
        if not self.held():
            raise UserError(
                f"{self._path} was removed or replaced while this run held it, so another run may "
                f"be training there: stop that run, if any, then run the same command again."
            )

    def held(self) -> bool:
        """True if the path still names the file that this process has locked."""
        if self._path is None or self._file is None:
            return True
        mine = os.fstat(self._file.fileno())
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            return False
        except OSError:
            return True  # unknown: an unresponsive file system does not mean another run
        return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)


@contextlib.contextmanager
def lock_workdir(workdir: Folder, say: Callable[[str], None] = print) -> Iterator[Lock]:
    """Hold WORKDIR/lock; the kernel releases it when the process ends for any reason.

    The file remains after the release and names the process that holds or held the lock.  If this
    call created the folder and the run fails before it writes any other file, the folder is
    removed too.  A process that gets the lock therefore checks that the file still has its name.
    An object store has no locks, so there is no protection there.  A local file system without
    locks gives none either, which is reported in one line to `say`.

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
            if not lock.held():  # the previous holder has removed the file
                continue
            _sign(file)
            try:
                yield lock
            except BaseException:
                if made and lock.held() and os.listdir(workdir) == [LOCK]:
                    (workdir / LOCK).unlink()
                    with contextlib.suppress(OSError):  # another process may use the folder now
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
            f"{workdir} is on a file system without locks ({reason(error)}): a second run in it "
            f"would not be refused, so start only one at a time."
        )


def _sign(file: TextIO) -> None:
    """Write the holder into the file; only an error message needs it, so a full disk is ignored."""
    with contextlib.suppress(OSError):
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
