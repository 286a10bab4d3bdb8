"""Counts the seconds of a run by phase and writes them to WORKDIR/goodput.jsonl.

`python -m moe_jax goodput` reads the file.  A row holds the totals of an attempt (one process, from
start to exit) so far, so a torn or missing row loses no time.  Most rows overwrite the previous
one: a day takes 0.4 MB for any step time.
"""

import contextlib
import math
import queue
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from moe_jax.errors import UserError
from moe_jax.files.lines import JsonLinesWriter
from moe_jax.files.workdir import Folder, Mirror
from moe_jax.files.write_errors import cannot_write
from moe_jax.parallel.distributed import exit_code
from moe_jax.parallel.process import process_age

GOODPUT = "goodput.jsonl"
INIT = "init"
# Seconds between two rows, or this share of a long attempt: the most that a kill can leave
# unaccounted for.
BEAT, SHARE = 2.0, 1e-3
# A row overwrites the previous one.  The previous one is kept if it is later than the last kept row
# by this share of the attempt's age, or by this many seconds.  `goodput` interpolates the steps
# between two rows.
KEPT_SHARE, MAX_KEPT = 0.2, 60.0
_LEAVE = 5.0  # seconds to wait at the end for the thread, which may be waiting for a lost device


class Timekeeper:
    """Sums the seconds of each phase and writes them to a file; a context manager.

    All time before `resumed` counts as init.  No row is written before it, so a refused command
    leaves no file.  Waiting for data counts as step while the devices still work on a step, because
    no device time is lost.

    A row has `attempt` (a unique name), `began` and `time` (seconds since 1970), `from` (the
    restored step), `step` (the last finished step), `seconds` by phase and, in the last row of an
    attempt, `end` (exit code).

    Args:
      workdir: folder of the run.
      lead: True on the lead process; the other processes neither count nor write.
      beat: seconds between two rows.
    """

    def __init__(self, workdir: Folder, lead: bool, beat: float = BEAT):
        age = process_age()
        self._began, self._born = time.time() - age, time.monotonic() - age
        self._workdir, self._lead, self._beat = workdir, lead, beat
        self._attempt: _Attempt | None = None  # set by the first `resumed` of the lead process

    def __enter__(self) -> "Timekeeper":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.ended(exit_code(error))

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the body as `phase`; phases do not nest."""
        attempt = self._attempt
        if attempt is None:
            yield
            return
        attempt.turn_to(phase)
        try:
            yield
        finally:
            attempt.turn_to("")
            if phase not in ("step", "data"):
                attempt.write()

    def resumed(self, step: int) -> None:
        """Report that the state is ready and training continues after `step`.

        Raises:
          UserError: the file cannot be written.
        """
        if self._attempt is not None:
            self._attempt.resumed(step)
        elif self._lead:
            rows = _Rows(self._workdir)
            self._attempt = _Attempt(rows, self._began, self._born, step, self._beat)

    def started(self, step: int, outputs: Any) -> None:
        """Report that `step` was launched; it is finished when `outputs` are ready."""
        if self._attempt is not None:
            self._attempt.started(step, outputs)

    def ended(self, code: int) -> None:
        """Write the last row: the process is about to end with exit code `code`."""
        if self._attempt is not None:
            self._attempt.ended(code)


class _Rows:
    """WORKDIR/goodput.jsonl, open for appending.

    Only opening it can fail: later errors are ignored, because every row includes earlier totals.

    Raises:
      UserError: the file cannot be opened.
    """

    def __init__(self, workdir: Folder):
        self._mirror = Mirror(workdir)
        try:
            self._mirror.folder.mkdir(parents=True, exist_ok=True)
            self._mirror.fetch(GOODPUT)
            # A row that waits for the disk is superseded by a later one.
            self._lines = JsonLinesWriter(self._mirror.folder / GOODPUT, lambda line: None, keep=1)
        except OSError as error:
            advice = "change its permissions or choose another --workdir"
            raise cannot_write(workdir / GOODPUT, error, advice) from None

    def append(self, row: Mapping[str, Any]) -> None:
        self._lines.append(row)

    def replace_last(self, row: Mapping[str, Any]) -> None:
        self._lines.replace_last(row)

    def push_if_due(self) -> None:
        with contextlib.suppress(UserError):
            self._mirror.push_if_due()

    def close(self) -> None:
        self._lines.close()
        with contextlib.suppress(UserError):
            self._mirror.close()


class _Attempt:
    """The seconds of one attempt, and the thread that waits for its steps and writes its rows.

    Args:
      rows: the file for the rows.
      began, born: start of the process, in seconds since 1970 and by `time.monotonic`.
      step: the restored step.
      beat: seconds between two rows.
    """

    def __init__(self, rows: _Rows, began: float, born: float, step: int, beat: float):
        self._rows, self._began, self._born, self._beat = rows, began, born, beat
        self._name = uuid.uuid4().hex[:12]
        self._seconds: dict[str, float] = {}
        self._phase, self._since = INIT, born
        self._from = self._started = step  # the restored step; the last launched step
        self._step, self._finished = step, born  # the last finished step, and the time it finished
        self._written, self._over = 0.0, False
        self._kept = -math.inf  # time of the last row that is not overwritten
        self._replaces = False  # True: the next row overwrites the last one
        self._outputs: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._listen, name="timekeeper", daemon=True)
        self.turn_to("")
        self.write()
        self._thread.start()

    def resumed(self, step: int) -> None:
        """Count from an earlier step, after a rewind."""
        self.turn_to("")
        self.write(keep=True)  # records the last step before the rewind
        self._from = self._started = self._step = step
        self.write(keep=True)

    def started(self, step: int, outputs: Any) -> None:
        self._started = step
        self._outputs.put((step, outputs))

    def ended(self, code: int) -> None:
        self._outputs.put(None)
        self._thread.join(_LEAVE)
        self.write(end=code)
        with self._lock:
            self._over = True
            self._rows.close()

    def turn_to(self, phase: str) -> None:
        """Count the time from now on as `phase`; "": as none."""
        with self._lock:
            self._book()
            self._phase = phase

    def write(self, keep: bool = False, **more: int) -> None:
        """Write a row of the totals so far; `keep`: no later row overwrites it."""
        with self._lock:
            if self._over:
                return
            self._book()
            row = {
                "attempt": self._name,
                "began": _milliseconds(self._began),
                "time": _milliseconds(time.time()),
                "from": self._from,
                "step": self._step,
                "seconds": {phase: _milliseconds(s) for phase, s in self._seconds.items()},
                **more,
            }
            (self._rows.replace_last if self._replaces else self._rows.append)(row)
            self._written = time.monotonic()
            distance = max(self._beat, KEPT_SHARE * (self._written - self._born))
            if keep or self._written - self._kept >= min(MAX_KEPT, distance):
                self._kept, self._replaces = self._written, False
            else:
                self._replaces = True

    def _book(self) -> None:
        """Add the time since the last call to the current phase."""
        now = time.monotonic()
        phase, seconds = self._phase, now - self._since
        if phase == "data":
            idle = now - max(self._since, self._finished) if self._step >= self._started else 0.0
            self._seconds["data"] = self._seconds.get("data", 0.0) + idle
            phase, seconds = "step", seconds - idle
        if phase:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
        self._since = now

    def _listen(self) -> None:
        """Wait for the devices, and write a row at the required intervals."""
        while True:
            now = time.monotonic()
            left = self._written + max(self._beat, SHARE * (now - self._born)) - now
            if left <= 0:
                self.write()
                self._rows.push_if_due()
                continue
            try:
                item = self._outputs.get(timeout=left)
            except queue.Empty:
                continue
            if item is None:
                return
            step, outputs = item
            with contextlib.suppress(Exception):  # the main thread reports the error
                jax.block_until_ready(outputs)
                with self._lock:
                    self._step, self._finished = step, time.monotonic()


def _milliseconds(seconds: float) -> float:
    """`seconds` rounded to milliseconds."""
    return round(seconds, 3)
