"""Rewinds a run past batches that led to divergence, and records which data each step then uses.

WORKDIR/rewinds.jsonl has one line per rewind.  The data of a step remains a pure function of the
step's number and the lines of the file (`data_step`).  A checkpoint contains the lines that existed
when it was saved, so that a lost or altered file is detected.

The skipped batches begin with the one after the checkpoint, good ones included, as in PaLM (arXiv
2204.02311, section 5.1: restart about 100 steps earlier and skip 200 to 500 batches).  Training on
the good ones again would reproduce the parameters that diverged bit for bit, because skipped steps
changed no state.
"""

import dataclasses
import datetime
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_jax.checkpoint import Checkpoints
from moe_jax.config import to_dict
from moe_jax.data.feed import RowsFn
from moe_jax.data.pipeline import Batches
from moe_jax.errors import UserError
from moe_jax.files import json_files, records, seals
from moe_jax.files.workdir import Folder
from moe_jax.files.write_errors import cannot_write
from moe_jax.parallel.distributed import lead

REWINDS = "rewinds.jsonl"
_IN_CHECKPOINT = "rewinds.json"  # a list of the lines
LARGEST = 2**40  # every step number is smaller


@dataclasses.dataclass(frozen=True)
class Rewind:
    """One line of the file.  Without rewinds, the step after n others uses data step n."""

    step: int  # step of the checkpoint that the run returned to
    data_step: int  # data step that the next training step uses instead of its own
    # First and last step that the step guard rejected; they caused the rewind.
    refused: tuple[int, int]
    skipped: tuple[int, int]  # first and last data step whose batches are never trained on
    why: str
    time: str  # UTC
    settled: bool  # later checkpoints are in quarantine; False only after a kill


def data_step(rewinds: Sequence[Rewind], step: int) -> int:
    """The data step that the training step after `step` others uses."""
    for rewind in reversed(rewinds):
        if rewind.step <= step:
            return step - rewind.step + rewind.data_step
    return step


def last_step(rewinds: Sequence[Rewind], data_steps: int) -> int:
    """The last step of a run whose data has `data_steps` steps."""
    return rewinds[-1].step + data_steps - rewinds[-1].data_step if rewinds else data_steps


def ordered_rows(batches: Batches, rewinds: Sequence[Rewind]) -> RowsFn:
    """The run's rows, for a feed: step n gets the rows of `data_step(rewinds, n)`."""
    return lambda step, row_ids: batches.rows(data_step(rewinds, step), row_ids)


class Rewinds:
    """The rewinds of a run.  Every process holds one; process 0 decides, writes and reports.

    The constructor completes the rewind of a killed process: it moves checkpoints later than the
    last line's step to quarantine.  Create it before any checkpoint is loaded, and call `check`
    afterwards.  The checkpoints that the run returned to are kept, so that the steps after them
    can be replayed.

    Attributes:
      history: lines of the file.

    Raises:
      UserError: the file cannot be read, or its last line is an unfinished rewind of another run.
    """

    def __init__(self, workdir: Folder, checkpoints: Checkpoints, say: Callable[[str], None]):
        self._path, self._checkpoints, self._say = workdir / REWINDS, checkpoints, say
        self.history = _parse(_from_lead(lambda: _text(self._path)), self._path)
        for rewind in self.history:
            checkpoints.pin(rewind.step)
        if self.history and not self.history[-1].settled:
            self._check_begun()
            self._settle()

    def data_step(self, step: int) -> int:
        """See `data_step`."""
        return data_step(self.history, step)

    def rows(self, batches: Batches) -> RowsFn:
        """See `ordered_rows`."""
        return ordered_rows(batches, self.history)

    def extra_files(self) -> dict[str, Any]:
        """The additional file of a checkpoint saved now, which `check` reads."""
        return {_IN_CHECKPOINT: _plain(self.history)}

    def check(self, step: int) -> None:
        """Check the file for a run resumed from `step` (0: no checkpoint); see `check_rewinds`."""
        if step:
            check_rewinds(self.history, step, self._checkpoints, self._path)
        elif self.history:
            raise UserError(
                f"{self._path} refers to checkpoints that do not exist: move it away to start from "
                f"step 0, or restore the checkpoints."
            )

    def _check_begun(self) -> None:
        """Check the file against the newest good checkpoint before later ones are quarantined."""
        *before, begun = self.history
        newest = self._checkpoints.latest_good_before(LARGEST)
        if newest is None or begun.step not in self._checkpoints.steps():
            raise UserError(
                f"{self._path} refers to a checkpoint of step {begun.step}, which does not exist: "
                f"restore the file or the checkpoint, or use another --workdir."
            )
        check_rewinds(before, newest, self._checkpoints, self._path)

    def go_back(self, changed: int, last: int, why: str) -> int | None:
        """Rewind, skip the batches up to that of step `last`, and return the step to resume from.

        That is the newest good checkpoint before step `changed`, the last that changed the
        parameters; later checkpoints hold the parameters that diverged.  If there is none, return
        None and change no file.  All processes must call this.

        A kill before the file is replaced leaves the run unchanged; after a later kill, the next
        start completes the rewind.
        """
        step = self._checkpoints.latest_good_before(changed)
        if step is None:
            return None
        past = self.data_step(last - 1)
        rewind = Rewind(
            step=step,
            data_step=past + 1,
            refused=(changed + 1, last),
            skipped=(self.data_step(step), past),
            why=why,
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            settled=False,
        )
        self._write((*self.history, rewind))
        self._settle()
        return step

    def _settle(self) -> None:
        *before, last = self.history
        self._checkpoints.pin(last.step)
        self._checkpoints.set_aside_after(last.step, self._say)
        self._write((*before, dataclasses.replace(last, settled=True)))

    def _write(self, history: tuple[Rewind, ...]) -> None:
        if lead():
            self._replace(history)
        self.history = history

    def _replace(self, history: tuple[Rewind, ...]) -> None:
        text = "".join(f"{json.dumps(seals.sealed(line))}\n" for line in _plain(history))
        try:
            json_files.replace_text(self._path, text)
        except OSError as error:
            raise cannot_write(self._path, error, "change its permissions") from None


def read_rewinds(workdir: Folder) -> tuple[Rewind, ...]:
    """The lines of a workdir's file, read only by this process; raises UserError as `Rewinds`."""
    return _parse(_text(workdir / REWINDS), workdir / REWINDS)


def check_rewinds(
    rewinds: Sequence[Rewind], step: int, checkpoints: Checkpoints, path: Folder
) -> None:
    """Check the lines of the file against those that the checkpoint of `step` contains.

    The file must begin with the checkpoint's lines, and its further lines must rewind to this
    checkpoint or a later one.

    Args:
      rewinds: the lines of the file.
      step: step of the checkpoint.
      checkpoints: the checkpoints of the run.
      path: the file, for the error message.

    Raises:
      UserError: the lines disagree, so the steps after the checkpoint would use other data.
    """
    saved = checkpoints.extra_file(step, _IN_CHECKPOINT)
    if saved is None:  # an older version, without this check, saved the checkpoint
        return
    known = saved if isinstance(saved, list) else [saved]  # a value of another type equals no line
    count = len(known)
    if known != _plain(rewinds[:count]) or any(later.step < step for later in rewinds[count:]):
        raise UserError(
            f"{path}, which says what data the steps of this run use, differs from the file that "
            f"the checkpoint of step {step} was saved with (its lines are in "
            f"{os.path.join(checkpoints.root, str(step), _IN_CHECKPOINT)}): restore that file, or "
            f"use another --workdir."
        )


def _plain(rewinds: Sequence[Rewind]) -> list[dict[str, Any]]:
    return [to_dict(rewind) for rewind in rewinds]


def _text(path: Folder) -> str:
    try:
        return b"".join(json_files.read_lines(path)).decode()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}).") from None


def _from_lead(read: Callable[[], str]) -> str:
    """The text that process 0 reads, on every process; each might see another file."""
    if jax.process_count() == 1:
        return read()
    data = np.frombuffer(read().encode(), np.uint8) if lead() else np.zeros(0, np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    whole = data if lead() else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(whole)).tobytes().decode()


def _parse(text: str, path: Folder) -> tuple[Rewind, ...]:
    try:
        return tuple(records.parse_lines(text.splitlines(), _rewind))
    except records.LineError as damaged:
        raise UserError(
            f"{path}, which says what data the steps of this run use, is damaged in line "
            f"{damaged.number}: restore it, or use another --workdir."
        ) from None


def _rewind(value: Any) -> Rewind:
    """Build a record; raises ValueError for one that no run wrote."""
    rewind = records.typed(Rewind, seals.unsealed(value))
    if max(rewind.step, rewind.data_step, *rewind.refused, *rewind.skipped) >= LARGEST:
        raise ValueError("a step is out of range")
    if rewind.data_step != rewind.skipped[1] + 1:
        raise ValueError("its data does not continue after the skipped steps")
    return rewind
