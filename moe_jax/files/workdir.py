"""Locates and writes the workdir of a run: a local folder, or one in an object store (gs://)."""

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
# Bytes reserved for the longest path inside a workdir: that of a quarantined step, or of a trace
# file, which contains the host name.
BELOW = 256


def is_remote(folder: os.PathLike[str] | str) -> bool:
    """True if `folder` is in an object store."""
    return "://" in os.fspath(folder)


def locate(workdir: str) -> Folder:
    """The folder that --workdir names; it is checked but not created.

    Raises:
      UserError: the folder cannot be created or written, its name is too long or has an unsupported
        scheme, a link in it leads out of it, or its object store cannot be reached.
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
    """Raise UserError if the name of `folder`, or a path below it, would be too long.

    Args:
      folder: absolute path of the workdir.
      there: its nearest existing parent, whose file system sets the limits.
    """
    longest_name, longest_path = (
        os.pathconf(there, "PC_NAME_MAX"),
        os.pathconf(there, "PC_PATH_MAX"),
    )
    name = max((len(os.fsencode(part)) for part in folder.parts), default=0)
    if name > longest_name:
        raise UserError(
            f"--workdir={folder} contains a name of {name} bytes, and the file system of {there} "
            f"allows {longest_name}: choose a shorter name."
        )
    path = len(os.fsencode(folder))
    if path + BELOW > longest_path:
        raise UserError(
            f"--workdir={folder} is a path of {path} bytes, which leaves less than {BELOW} for the "
            f"files in it ({there} allows {longest_path}): choose a shorter path."
        )


class Mirror:
    """A local folder to write to: the workdir itself, or a temporary folder copied to it.

    An object store cannot append to an object; each copy atomically replaces the previous one.

    Args:
      there: the workdir, or a folder inside it.
      seconds: how old the copies may become while the run continues.
    """

    def __init__(self, there: Folder, seconds: float = 30.0):
        self._there, self._seconds = there, seconds
        self._remote = is_remote(there)
        self._copied: dict[pathlib.Path, tuple[int, int]] = {}
        self._due = 0.0
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="moe_jax_") if self._remote else there)

    def fetch(self, pattern: str) -> None:
        """Copy the files that earlier attempts of the run left in the object store."""
        for file in self._there.glob(pattern) if self._remote else ():
            local = self.folder / file.name
            local.write_bytes(file.read_bytes())
            self._copied[local] = _mark(local)

    def push_if_due(self) -> None:
        """Call `push`, unless the last call was less than `seconds` ago."""
        if time.monotonic() >= self._due:
            self.push()

    def push(self) -> None:
        """Copy changed files to the workdir; raises UserError if that fails, keeping the files."""
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
            except Exception as error:  # each store's client has its own exception types
                raise UserError(
                    f"{file.name} could not be copied to {self._there} ({reason(error)}): the "
                    f"local copy remains in {self.folder}."
                ) from None
            self._copied[file] = mark

    def close(self) -> None:
        """Copy the remaining changes and remove the local folder if it is a temporary one."""
        self.push()
        if self._remote:
            shutil.rmtree(self.folder)


def _mark(file: pathlib.Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns
