"""Keeps writes inside a folder: refuses symlinks that leave it and breaks hard links."""

import os
import shutil

from moe_jax.errors import UserError


def check_links(folder: os.PathLike[str] | str) -> None:
    """Raise UserError for a symlink below the local `folder` that leads out of it.

    Writing, truncating or deleting through such a link would change a file outside the folder.
    The folder itself may be a link, because the user named it.
    """
    root = os.path.realpath(folder)
    for here, folders, files in os.walk(root):  # os.walk follows no links
        for name in (*folders, *files):
            check_link(os.path.join(here, name), root)


def check_link(path: os.PathLike[str] | str, root: os.PathLike[str] | str) -> None:
    """Raise UserError if `path` is a symlink that leads out of `root`."""
    if not os.path.islink(path):
        return
    root, target = os.path.realpath(root), os.path.realpath(path)
    if os.path.commonpath((root, target)) != root:
        raise UserError(
            f"{os.fspath(path)} is a link to {target}, outside the folder to write to: replace "
            f"the link by the file or folder itself, or remove it."
        )


def break_hard_link(path: os.PathLike[str] | str) -> None:
    """Break the hard links of the file `path` by copying it; call this before appending to it.

    Backups made by `cp -al` and `rsync --link-dest` are hard links and would grow with the file.

    Raises:
      OSError: the copy cannot be written.
    """
    if os.path.isfile(path) and os.stat(path).st_nlink > 1:
        copy = f"{os.fspath(path)}.own"
        shutil.copy2(path, copy)
        os.replace(copy, path)
