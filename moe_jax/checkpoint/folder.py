"""The folder of a run's steps: what is in it, what leaves it and where to."""

import os
import re

import jax
from etils import epath

from moe_jax.checkpoint import manifest
from moe_jax.checkpoint.causes import cause_of
from moe_jax.errors import UserError

QUARANTINE = "quarantine"
_DOOMED = ".doomed"  # suffix of a step that retention is deleting
# Of saves and deletions that were killed.
_LEFTOVER = re.compile(rf"\d+(\.orbax-checkpoint-tmp.*|{re.escape(_DOOMED)})")


class StepFolder:
    """One directory for each step, and quarantine/.

    Args:
      root: WORKDIR/checkpoints, local (relative or not) or gs://.
      keep_last: how many of the newest steps `retain` keeps.
      keep_every: steps divisible by this are kept for good; 0: none.
    """

    def __init__(self, root: os.PathLike[str] | str, keep_last: int, keep_every: int):
        root = os.fspath(root)
        # Orbax saves under a relative root and then cannot load from it.
        self.root = epath.Path(root if "://" in root else os.path.abspath(root))
        self._keep_last, self._keep_every = keep_last, keep_every
        self._pinned: set[int] = set()
        self._swept = False

    def path(self, step: int) -> epath.Path:
        """Where `step` lies, or would."""
        return self.root / str(step)

    def steps(self) -> list[int]:
        """Steps that were saved, ascending, good or bad; unfinished saves are not among them."""
        return [step for step in self._numbered() if manifest.committed(self.path(step))]

    def quarantined(self) -> list[str]:
        """Names of the steps that were set aside, as they stand in quarantine/."""
        aside = self.root / QUARANTINE
        return sorted(path.name for path in aside.iterdir()) if aside.exists() else []

    def make_room(self, step: int) -> bool:
        """Readies the folder for a save of `step`; False where that step is there."""
        self.sweep()
        if step in self.steps():
            return False
        if self.path(step).exists() and any(self.path(step).iterdir()):
            self.set_aside(step)  # somebody's files under the name of a step
        self.root.mkdir(parents=True, exist_ok=True)
        return True

    def set_aside(self, step: int) -> epath.Path:
        """Moves `step` to quarantine/, under a name that is still free."""
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
        """`retain` leaves `step` alone for as long as this object lives."""
        self._pinned.add(step)

    def retain(self) -> None:
        """Deletes the steps that need not be kept."""
        for step in self.steps()[: -self._keep_last]:
            for_good = self._keep_every and step % self._keep_every == 0
            if not for_good and step not in self._pinned:
                # Renamed first: a kill half way leaves nothing that looks like a step.
                doomed = self.root / f"{step}{_DOOMED}"
                self.path(step).rename(doomed)
                _remove(doomed)

    def sweep(self, again: bool = False) -> None:
        """Removes what killed saves and deletions left behind: once, or `again`."""
        if (again or not self._swept) and jax.process_index() == 0:
            self._swept = False
            for path in self.root.iterdir() if self.root.exists() else ():
                if _LEFTOVER.fullmatch(path.name):
                    _remove(path)
        self._swept = True

    def _numbered(self) -> list[int]:
        if not self.root.exists():
            return []
        names = (path.name for path in self.root.iterdir() if path.is_dir())
        return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9]\d{0,8}", name))


def _remove(path: epath.Path) -> None:
    """Removes a folder with all that is in it; of a link, the link alone."""
    if os.path.islink(path):
        path.unlink()
    else:
        path.rmtree()
