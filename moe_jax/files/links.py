"""Links in a folder that this program writes to: what is outside of it stays as it is."""

import os
import shutil

from moe_jax.errors import UserError


def check_links(folder: os.PathLike[str] | str) -> None:
    """Raises UserError naming a link below `folder` (local) that leads out of it.

    What is written, cut short or deleted under the link's name would be somebody else's.  The
    folder itself may be a link: the user named it.
    """
    root = os.path.realpath(folder)
    for here, folders, files in os.walk(root):  # goes through no link
        for name in (*folders, *files):
            check_link(os.path.join(here, name), root)


def check_link(path: os.PathLike[str] | str, root: os.PathLike[str] | str) -> None:
    """Raises UserError if `path` is a link that leads out of `root`."""
    if not os.path.islink(path):
        return
    root, target = os.path.realpath(root), os.path.realpath(path)
    if os.path.commonpath((root, target)) != root:
        raise UserError(
            f"{os.fspath(path)} is a link to {target}, outside of the folder that would be "
            f"written to: put the file or the folder itself there, or remove the link."
        )


def own(path: os.PathLike[str] | str) -> None:
    """Parts the file `path` from its other names (hard links), before something is appended to it.

    `cp -al` and `rsync --link-dest` make such names for backups, which would grow with it.

    Raises:
      OSError: there is no room for a copy.
    """
    if os.path.isfile(path) and os.stat(path).st_nlink > 1:
        copy = f"{os.fspath(path)}.own"
        shutil.copy2(path, copy)
        os.replace(copy, path)
