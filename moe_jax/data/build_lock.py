"""A per-host lock for building a store, through which waiting processes see its progress."""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO

from etils import epath

from moe_jax.errors import UserError
from moe_jax.files.links import check_link, check_links

LOOK_INTERVAL = 0.25  # seconds between two checks by a waiting process
TELL_INTERVAL = 1.0  # seconds between two updates of the lock file's time by the builder


class BuildLock:
    """A per-host lock for building a store; waiting processes see whether the builder progresses.

    The builder holds a kernel lock on ROOT/NAME.lock, which it removes at its end, and updates
    that file's time while it makes progress.  The waiting processes read the time, so each of them
    counts as making progress only while the builder does.

    Args:
      on_progress: called when a build makes progress, here or in the builder that this process
        waits for.
    """

    def __init__(self, on_progress: Callable[[], None]):
        self._on_progress = on_progress
        self._held: BinaryIO | None = None
        self._due = 0.0

    def on_progress(self) -> None:
        """Record that this process has made progress with its text or its store."""
        self._on_progress()
        if self._held is not None and time.monotonic() >= self._due:
            os.utime(self._held.fileno())
            self._due = time.monotonic() + TELL_INTERVAL

    @contextlib.contextmanager
    def __call__(self, root: epath.Path, name: str) -> Iterator[None]:
        """Wait for the lock of ROOT/NAME and hold it; on gs:// there is none.

        The kernel frees the lock if the process ends.

        Raises:
          UserError: `root` cannot be written, or a link in the store leads out of it.
        """
        if "://" in os.fspath(root):
            yield
            return
        path = root / f"{name}.lock"
        with self._locked(path) as file:
            check_link(root / name, root)
            check_links(root / name)
            self._held = file
            try:
                yield
            finally:
                self._held = None
                path.unlink(missing_ok=True)  # while it is locked

    def _locked(self, path: epath.Path) -> BinaryIO:
        """The lock file, open and locked; opened again if its last holder has removed it."""
        while True:
            file = self._opened(path)
            try:
                self._wait(file, path)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                        return file
            except BaseException:
                file.close()
                raise
            file.close()

    def _opened(self, path: epath.Path) -> BinaryIO:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            return os.fdopen(os.open(path, flags, 0o666), "wb")
        except OSError as error:
            advice = "make room there or set" if error.errno == errno.ENOSPC else "set"
            raise UserError(
                f"The store cannot be written to {path.parent} ({error.strerror}): {advice} "
                f"data.store to a different folder."
            ) from None

    def _wait(self, file: BinaryIO, path: epath.Path) -> None:
        seen = os.fstat(file.fileno()).st_mtime_ns
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(LOOK_INTERVAL)
            except OSError as error:  # a file system without locks
                raise UserError(
                    f"{path} cannot be locked ({error.strerror}), so two processes could build the "
                    f"same store. Set data.store to a folder on a file system with locks."
                ) from None
            told = os.fstat(file.fileno()).st_mtime_ns
            if told != seen:
                seen = told
                self._on_progress()
