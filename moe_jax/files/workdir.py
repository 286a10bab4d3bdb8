"""Where a run lies: a local folder, or one of an object store (gs://)."""

import os
import pathlib
import shutil
import tempfile
import time

from etils import epath

from moe_jax.errors import UserError
from moe_jax.files.links import check_links
from moe_jax.files.schemes import check_scheme, reach, reason

Folder = pathlib.Path | epath.Path
# Bytes of the longest path in a workdir, with room to spare: a step in quarantine, or a trace,
# whose file has the name of the host.
BELOW = 256


def is_remote(folder: os.PathLike[str] | str) -> bool:
    """Whether `folder` lies in an object store."""
    return "://" in os.fspath(folder)


def locate(workdir: str) -> Folder:
    """The folder that --workdir names; makes nothing.

    Raises:
      UserError: it cannot be made or written, its name is too long or of a store that is not
        supported, a link in it leads out of it, or its store cannot be reached.
    """
    check_scheme(workdir, "--workdir")
    if is_remote(workdir):
        with reach(workdir, "--workdir"):
            folder = epath.Path(workdir)
            folder.exists()
        return folder
    folder = pathlib.Path(os.path.expanduser(workdir)).absolute()
    there = next(f for f in (folder, *folder.parents) if os.path.exists(f))
    _check_length(folder, there)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "write-protected" if there.is_dir() else "not a folder"
        raise UserError(
            f"--workdir={folder} cannot be written ({there} is {why}): choose another folder."
        )
    check_links(folder)
    return folder


def _check_length(folder: pathlib.Path, there: pathlib.Path) -> None:
    """Raises UserError where names below `folder`, or its own, would be too long.

    Args:
      there: the nearest folder that exists, whose file system has the limits.
    """
    longest_name, longest_path = (
        os.pathconf(there, "PC_NAME_MAX"),
        os.pathconf(there, "PC_PATH_MAX"),
    )
    name = max((len(os.fsencode(part)) for part in folder.parts), default=0)
    if name > longest_name:
        raise UserError(
            f"--workdir={folder} has a name of {name} bytes in it and the file system of {there} "
            f"takes {longest_name}: choose a shorter name."
        )
    path = len(os.fsencode(folder))
    if path + BELOW > longest_path:
        raise UserError(
            f"--workdir={folder} is a path of {path} bytes, which leaves less than {BELOW} for the "
            f"files in it ({there} takes {longest_path}): choose a shorter path."
        )


class Mirror:
    """A local folder to write to: that of the run, or one that is copied to it.

    Object stores hold whole objects: nothing can be appended to, and each copy replaces the one
    before, at once.

    Args:
      there: folder of the run, or one inside it.
      seconds: how old the copies of a running run may be.
    """

    def __init__(self, there: Folder, seconds: float = 30.0):
        self._there, self._seconds = there, seconds
        self._remote = is_remote(there)
        self._copied: dict[pathlib.Path, tuple[int, int]] = {}
        self._due = 0.0
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="moe_jax_") if self._remote else there)

    def fetch(self, pattern: str) -> None:
        """Brings files that an earlier process of the run left."""
        for file in self._there.glob(pattern) if self._remote else ():
            local = self.folder / file.name
            local.write_bytes(file.read_bytes())
            self._copied[local] = _mark(local)

    def push_if_due(self) -> None:
        """`push`, unless the last one was less than `seconds` ago."""
        if time.monotonic() >= self._due:
            self.push()

    def push(self) -> None:
        """Copies what has changed; raises UserError where that fails, and loses nothing."""
        if not self._remote:
            return
        self._due = time.monotonic() + self._seconds
        for file in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            mark = _mark(file)
            if self._copied.get(file) == mark:
                continue
            try:
                target = self._there / file.relative_to(self.folder).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
            except Exception as error:  # of whichever client the store has
                raise UserError(
                    f"{file.name} could not be copied to {self._there} ({reason(error)}): it is "
                    f"kept in {self.folder}."
                ) from None
            self._copied[file] = mark

    def close(self) -> None:
        """Copies the rest and removes the local folder, if it is only a copy."""
        self.push()
        if self._remote:
            shutil.rmtree(self.folder)


def _mark(file: pathlib.Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns
