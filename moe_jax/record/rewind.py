"""Going back past batches that broke the run: which data a step then takes, and the record of it.

WORKDIR/rewinds.jsonl has a line for each time the run went back.  Data stays a pure function of
the step: that of the file's lines and the step's number (`data_step`).  A checkpoint holds the
lines that were there when it was saved, so that a file which is lost or altered is noticed.

What is left out begins with the batch after the checkpoint, good ones included, as PaLM did it
(arXiv 2204.02311, section 5.1: back about 100 steps, and on without 200 to 500 batches).  Taking
the good ones again would rebuild the very parameters that diverged, bit for bit: refused steps
changed nothing.
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
LARGEST = 2**40  # no step counts further


@dataclasses.dataclass(frozen=True)
class Rewind:
    """One line of the file.  Step n of the data is what the step after n others takes."""

    step: int  # of the checkpoint that the run went back to
    data_step: int  # what the step after it takes instead of its own data
    refused: tuple[int, int]  # first and last of the steps that made it necessary, as logged
    skipped: tuple[int, int]  # first and last step of the data that are left out
    why: str
    time: str  # UTC
    settled: bool  # later checkpoints are in quarantine; False only after a kill


def data_step(rewinds: Sequence[Rewind], step: int) -> int:
    """Which step of the data the step after `step` others takes."""
    for rewind in reversed(rewinds):
        if rewind.step <= step:
            return step - rewind.step + rewind.data_step
    return step


def last_step(rewinds: Sequence[Rewind], data_steps: int) -> int:
    """The last step of the run, where the data has so many steps."""
    return rewinds[-1].step + data_steps - rewinds[-1].data_step if rewinds else data_steps


def ordered_rows(batches: Batches, rewinds: Sequence[Rewind]) -> RowsFn:
    """The run's rows, for a feed: those of step n are those of `data_step(rewinds, n)`."""
    return lambda step, row_ids: batches.rows(data_step(rewinds, step), row_ids)


class Rewinds:
    """The way back of a run.  Every process holds one; process 0 decides, writes and tells.

    Opening it finishes what a killed process began: checkpoints later than the last line's step
    go to quarantine.  So do that before any checkpoint is loaded, and `check` afterwards.  The
    checkpoints that the run went back to are kept, so that the steps after them can be replayed.

    Attributes:
      history: lines of the file.

    Raises:
      UserError: the file cannot be read, or has begun something that this run did not.
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

    def beside(self) -> dict[str, Any]:
        """What a checkpoint that is saved now must hold, for `check`."""
        return {_IN_CHECKPOINT: _plain(self.history)}

    def check(self, step: int) -> None:
        """See `check_rewinds`; for a run that goes on from the checkpoint of `step`, 0: of none."""
        if step:
            check_rewinds(self.history, step, self._checkpoints, self._path)
        elif self.history:
            raise UserError(
                f"{self._path} tells of checkpoints and there are none: move it away to begin "
                f"anew, or bring them back."
            )

    def _check_begun(self) -> None:
        """Before checkpoints are set aside: the file is that of the newest good one."""
        *before, begun = self.history
        newest = self._checkpoints.latest_good_before(LARGEST)
        if newest is None or begun.step not in self._checkpoints.steps():
            raise UserError(
                f"{self._path} tells of a checkpoint of step {begun.step}, which is not there: "
                f"bring the file or the checkpoint back, or use another --workdir."
            )
        check_rewinds(before, newest, self._checkpoints, self._path)

    def go_back(self, changed: int, last: int, why: str) -> int | None:
        """Leaves out the batches up to that of step `last`; returns the step to go on from.

        That is the newest good checkpoint before step `changed`, the last that changed the
        parameters: those written since hold the very parameters that diverge.  None, and nothing
        is changed, where there is no such checkpoint.  All processes must call this.

        A kill before the file is replaced leaves the run as it was before; after that, the next
        start ends what is missing.
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
    """The lines of a workdir's file, read by this process alone; raises UserError as `Rewinds`."""
    return _parse(_text(workdir / REWINDS), workdir / REWINDS)


def check_rewinds(
    rewinds: Sequence[Rewind], step: int, checkpoints: Checkpoints, path: Folder
) -> None:
    """Checks the lines of the file `path` against those that the checkpoint of `step` knows.

    The file begins with them, and what came later went back to this checkpoint or a later one.

    Raises:
      UserError: it does not: the steps after the checkpoint would take other data.
    """
    saved = checkpoints.beside(step, _IN_CHECKPOINT)
    if saved is None:  # the checkpoint is older than this check
        return
    known = saved if isinstance(saved, list) else [saved]  # what is no line equals none
    count = len(known)
    if known != _plain(rewinds[:count]) or any(later.step < step for later in rewinds[count:]):
        raise UserError(
            f"{path}, which says what data the steps of this run take, is not the file that the "
            f"checkpoint of step {step} was saved with (whose lines are in "
            f"{os.path.join(checkpoints.root, str(step), _IN_CHECKPOINT)}): bring it back, or use "
            f"another --workdir."
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
    """What process 0 reads, on every process: file systems may show them different files."""
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
            f"{path}, which says what data the steps of this run take, is damaged in line "
            f"{damaged.number}: bring it back, or use another --workdir."
        ) from None


def _rewind(value: Any) -> Rewind:
    """Raises ValueError for a record that no run wrote."""
    rewind = records.typed(Rewind, seals.unsealed(value))
    if max(rewind.step, rewind.data_step, *rewind.refused, *rewind.skipped) >= LARGEST:
        raise ValueError("a step is out of range")
    if rewind.data_step != rewind.skipped[1] + 1:
        raise ValueError("its data does not go on after the skipped steps")
    return rewind
