"""Links in a folder that this program writes to: one that leads out of it is refused."""

import os

from moe_jax.errors import UserError


def check_links(folder: os.PathLike[str] | str) -> None:
    """Raises UserError naming a link below `folder` (local) that leads out of it.

    What is written, cut short or deleted under the link's name would be somebody else's.
    """
    root = os.path.realpath(folder)
    for here, folders, files in os.walk(root):  # goes through no link
        for name in (*folders, *files):
            path = os.path.join(here, name)
            if not os.path.islink(path):
                continue
            target = os.path.realpath(path)
            if os.path.commonpath((root, target)) != root:
                raise UserError(
                    f"{path} is a link to {target}, outside of the folder that would be written "
                    f"to: put the file or the folder itself there, or remove the link."
                )
