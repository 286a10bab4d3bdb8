"""How Orbax writes and commits a step here: the manifest goes in before, what it wrote after."""

import json
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from moe_jax.checkpoint import manifest


class Handler(ocp.PyTreeCheckpointHandler):
    """Orbax's pytree handler that ends a save with the manifest.

    `finalize` runs on process 0 after every process has written and before the step is renamed.

    Attributes:
      beside: file name -> JSON value, for the save under way.
    """

    beside: Mapping[str, Any] = {}

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        for name, value in self.beside.items():
            (directory / name).write_text(json.dumps(value) + "\n")
        manifest.write(directory)


class Renamed(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A step until it has its name; the manifest takes in at once what the commit wrote.

    `finalize` runs on process 0, and the other processes wait for it.
    """

    async def finalize(self) -> None:
        await super().finalize()
        manifest.seal(self.get_final())


class Marked(ocp.path.atomicity.CommitFileTemporaryPath):
    """The same where nothing can be renamed: a step until it has its marker."""

    async def finalize(self) -> None:
        await super().finalize()
        manifest.seal(self.get_final())


# Orbax finds a handler by the type of its arguments.
@ocp.args.register_with_handler(Handler, for_save=True)
class Save(ocp.args.PyTreeSave):
    """What to save."""


@ocp.args.register_with_handler(Handler, for_restore=True)
class Restore(ocp.args.PyTreeRestore):
    """How to restore it."""
