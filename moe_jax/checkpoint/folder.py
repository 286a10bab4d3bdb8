"""The folder of a run's checkpoints: lists, quarantines and deletes them."""

import os
import re

import jax
from etils import epath

from moe_jax.checkpoint import manifest
from moe_jax.checkpoint.causes import cause_of
from moe_jax.errors import UserError

QUARANTINE = "quarantine"
_DOOMED = ".doomed"  # suffix of a checkpoint that retention is deleting
# Left by saves and deletions that were killed.
_LEFTOVER = re.compile(rf"\d+(\.orbax-checkpoint-tmp.*|{re.escape(_DOOMED)})")


class StepFolder:
    """A folder with one directory per checkpoint, named by its step, and quarantine/.

    Args:
      root: WORKDIR/checkpoints, a local path (relative or absolute) or gs://.
      keep_last: number of newest checkpoints that `retain` keeps.
      keep_every: `retain` never deletes checkpoints of steps divisible by this; 0: it may delete
        any older checkpoint.
    """

    def __init__(self, root: os.PathLike[str] | str, keep_last: int, keep_every: int):
        root = os.fspath(root)
        # Orbax can save to a relative root but not load from it.
        self.root = epath.Path(root if "://" in root else os.path.abspath(root))
        self._keep_last, self._keep_every = keep_last, keep_every
        self._pinned: set[int] = set()
        self._leftovers_removed = False

    def path(self, step: int) -> epath.Path:
        """The directory of the checkpoint of `step`, which may not exist."""
        return self.root / str(step)

    def steps(self) -> list[int]:
        """The steps of all checkpoints, ascending, good or bad; without unfinished saves."""
        return [step for step in self._numbered() if manifest.committed(self.path(step))]

    def quarantined(self) -> list[str]:
        """Names of the directories in quarantine/."""
        aside = self.root / QUARANTINE
        return sorted(path.name for path in aside.iterdir()) if aside.exists() else []

    def make_room(self, step: int) -> bool:
        """Prepare the folder for a save of `step`; False if its checkpoint already exists."""
        self.remove_leftovers()
        if step in self.steps():
            return False
        if self.path(step).exists() and any(self.path(step).iterdir()):
            self.set_aside(step)  # files of another origin in a directory named like a step
        self.root.mkdir(parents=True, exist_ok=True)
        return True

    def set_aside(self, step: int) -> epath.Path:
        """Move the checkpoint of `step` to quarantine/, under an unused name."""
        folder = self.root / QUARANTINE
        target, count = folder / str(step), 1
        while target.exists():
            target, count = folder / f"{step}.{count}", count + 1
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return self.path(step).rename(target)
        except OSError as error:
            raise UserError(
                f"The checkpoint {self.path(step)} cannot be moved to {target} "
                f"({cause_of(error)}): move it yourself, then run the same command again."
            ) from error

    def pin(self, step: int) -> None:
        """Exempt the checkpoint of `step` from `retain` for the lifetime of this object."""
        self._pinned.add(step)

    def retain(self) -> None:
        """Delete the checkpoints that need not be kept."""
        for step in self.steps()[: -self._keep_last]:
            for_good = self._keep_every and step % self._keep_every == 0
            if not for_good and step not in self._pinned:
                # Renamed first, so that a kill during the deletion leaves no partial folder.
                doomed = self.root / f"{step}{_DOOMED}"
                self.path(step).rename(doomed)
                _remove(doomed)

    def remove_leftovers(self, again: bool = False) -> None:
        """Remove what killed saves and deletions left.

        Later calls do nothing unless again=True.
        """
        if (again or not self._leftovers_removed) and jax.process_index() == 0:
            self._leftovers_removed = False
            for path in self.root.iterdir() if self.root.exists() else ():
                if _LEFTOVER.fullmatch(path.name):
                    _remove(path)
        self._leftovers_removed = True

    def _numbered(self) -> list[int]:
        if not self.root.exists():
            return []
        names = (path.name for path in self.root.iterdir() if path.is_dir())
        return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9]\d{0,8}", name))


def _remove(path: epath.Path) -> None:
    """Remove a folder with its contents; if it is a link, remove only the link."""
    if os.path.islink(path):
        path.unlink()
    else:
        path.rmtree()
