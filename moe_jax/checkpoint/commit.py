"""Adds the manifest to Orbax's commit of a checkpoint.

The manifest is written before the commit.  Files that the commit itself writes are added to the
manifest afterwards.
"""

import json
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from moe_jax.checkpoint import manifest


class Handler(ocp.PyTreeCheckpointHandler):
    """Orbax's pytree handler, which here also writes the manifest at the end of a save.

    `finalize` runs on process 0 after every process has written and before the step is renamed.

    Attributes:
      extra_files: file name -> JSON value; the additional files of the current save.
    """

    extra_files: Mapping[str, Any] = {}

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        for name, value in self.extra_files.items():
            (directory / name).write_text(json.dumps(value) + "\n")
        manifest.write(directory)


class Renamed(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """An unfinished local step, committed by a rename; the commit's files then join the manifest.

    `finalize` runs on process 0, and the other processes wait for it.
    """

    async def finalize(self) -> None:
        await super().finalize()
        manifest.seal(self.get_final())


class Marked(ocp.path.atomicity.CommitFileTemporaryPath):
    """An unfinished step in an object store, which cannot rename: committed by a marker file."""

    async def finalize(self) -> None:
        await super().finalize()
        manifest.seal(self.get_final())


# Orbax finds a handler by the type of its arguments.
@ocp.args.register_with_handler(Handler, for_save=True)
class Save(ocp.args.PyTreeSave):
    """The arguments of a save."""


@ocp.args.register_with_handler(Handler, for_restore=True)
class Restore(ocp.args.PyTreeRestore):
    """The arguments of a restore."""
