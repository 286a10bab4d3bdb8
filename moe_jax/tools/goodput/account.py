"""From rows of goodput.jsonl to seconds in each category, which add up to the whole."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from moe_jax.errors import UserError
from moe_jax.files import json_files, records
from moe_jax.files.workdir import Folder
from moe_jax.watch.timekeeper import GOODPUT, INIT

# Category -> what it is.  Every moment from the first start to the last sign of life is in one.
CATEGORIES = {
    "step": "steps that the run still has",
    "lost": "steps taken again after a restart",
    "data": "devices idle, waiting for a batch",
    "compile": "compiling the train step",
    "checkpoint": "training blocked by a save",
    "evaluation": "held-out loss, samples",
    INIT: "from a process's start to its state on the devices",
    "restart": "from the last sign of life to the next start",
    "paused": "from an orderly end (exit 0) to the next start",
    "other": "anything else, a suspended machine included",
}
GAPS = ("restart", "paused")
_MEASURED = ("step", "data", "compile", "checkpoint", "evaluation", INIT)
_LATEST = 1e11  # seconds; a time beyond it, some 3000 years from 1970, is none


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One process of a run, and the time before it (`GAPS`) in which there was none."""

    began: float  # seconds since 1970
    resumed: int  # the step it went on from
    reached: int  # the last step it finished
    kept: int  # the last of its steps that no later attempt took again
    end: int | None  # exit code; None: it did not say (killed, or at work)
    seconds: dict[str, float]  # by category

    @property
    def gap(self) -> float:
        """Seconds before it."""
        return math.fsum(self.seconds[name] for name in GAPS)

    @property
    def own(self) -> float:
        """Seconds from its start to its last sign of life."""
        return math.fsum(time for name, time in self.seconds.items() if name not in GAPS)


@dataclasses.dataclass(frozen=True)
class Account:
    """A run: its attempts in order."""

    attempts: list[Attempt]
    unreadable: int  # lines that are no rows

    @property
    def seconds(self) -> dict[str, float]:
        """By category, over all attempts."""
        return {
            name: math.fsum(attempt.seconds[name] for attempt in self.attempts)
            for name in CATEGORIES
        }

    @property
    def whole(self) -> float:
        """Seconds from the first start to the last sign of life."""
        return math.fsum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Share that went into steps which the run still has, of all time but pauses."""
        seconds = self.seconds
        meant = math.fsum(time for name, time in seconds.items() if name != "paused")
        return seconds["step"] / meant if meant else 0.0


class _Row(NamedTuple):
    attempt: str
    began: float
    time: float
    resumed: int
    step: int
    seconds: dict[str, float]
    end: int | None


class _Span(NamedTuple):
    """What an attempt says of itself; `taken`: (steps done, seconds of steps so far), in order."""

    began: float
    resumed: int
    seconds: dict[str, float]
    whole: float
    end: int | None
    taken: list[tuple[int, float]]


def read(path: Folder) -> Account:
    """The account in WORKDIR/goodput.jsonl.

    Raises:
      UserError: no such file, or no row in it.
    """
    try:
        lines = json_files.read_lines(path)
    except FileNotFoundError:
        raise UserError(f"There is no {path}: name the workdir of a run.") from None
    found = account(lines)
    if not found.attempts:
        raise UserError(f"{path} holds no row of {GOODPUT}: name the workdir of a run.")
    return found


def account(lines: Sequence[bytes]) -> Account:
    """Adds up `lines`; what is not a row is left out and counted.

    An attempt lasts from its start to its last row.  What a killed one did after that (`BEAT`
    seconds or a `SHARE` of its age at most) and the time until the next start are `restart`;
    after an attempt that was done, or that a STOP file ended, the time is `paused`.
    Clocks that go backwards make both shorter, never negative.
    """
    rows = [records.parse_line(line, _row) for line in lines]
    by_attempt: dict[str, list[_Row]] = {}
    for row in rows:
        if row is not None:
            by_attempt.setdefault(row.attempt, []).append(row)
    spans = [_span(rows) for rows in by_attempt.values()]
    kept = list(_kept(spans))
    attempts = []
    ended, gap_name = (spans[0].began if spans else 0.0), "restart"
    for span, (lost, last) in zip(spans, kept, strict=True):
        seconds = dict.fromkeys(CATEGORIES, 0.0) | span.seconds
        gap = span.began - ended
        # Where the clock was set back, or one process makes several runs, an attempt began before
        # the last one ended: that time is counted there.
        seconds[INIT] = max(0.0, seconds[INIT] + min(0.0, gap))
        seconds[gap_name] = max(0.0, gap)
        seconds["lost"] = min(lost, seconds["step"])
        seconds["step"] -= seconds["lost"]
        seconds["other"] = max(0.0, span.whole - math.fsum(span.seconds.values()))
        ended, gap_name = span.began + span.whole, "paused" if span.end == 0 else "restart"
        reached = span.taken[-1][0]
        attempts.append(Attempt(span.began, span.resumed, reached, last, span.end, seconds))
    return Account(attempts, rows.count(None))


def _span(rows: Sequence[_Row]) -> _Span:
    """The rows of one attempt, each of which counts from its start."""
    first, last = rows[0], rows[-1]
    measured = math.fsum(last.seconds.values())
    taken = [(row.step, row.seconds.get("step", 0.0)) for row in rows]
    whole = max(measured, last.time - first.began)
    return _Span(first.began, first.resumed, last.seconds, whole, last.end, taken)


def _kept(spans: Sequence[_Span]) -> Iterator[tuple[float, int]]:
    """For each attempt: seconds of steps that were lost, and the last step that was not."""
    found = []
    limit = math.inf  # later attempts took every step beyond it again
    for span in reversed(spans):
        before, lost = limit, 0.0
        for (start, since), (stop, until) in reversed(list(itertools.pairwise(span.taken))):
            seconds = max(0.0, until - since)
            if stop < start:  # went back within one attempt
                lost += seconds
                limit = min(limit, stop)
            elif stop > start:
                lost += seconds * min(1.0, max(0.0, stop - max(start, limit)) / (stop - start))
            elif stop >= limit:  # at work on the step after `stop`
                lost += seconds
        found.append((lost, int(min(span.taken[-1][0], before))))
        limit = min(limit, span.resumed)
    return reversed(found)


def _row(value: Any) -> _Row:
    """Raises ValueError for a row that no attempt wrote."""
    row = records.mapping(value)
    seconds, end = records.mapping(row.get("seconds")), row.get("end")
    return _Row(
        records.text(row.get("attempt")),
        records.number(row.get("began"), _LATEST),
        records.number(row.get("time"), _LATEST),
        records.count(row.get("from")),
        records.count(row.get("step")),
        {name: records.number(seconds[name], _LATEST) for name in _MEASURED if name in seconds},
        None if end is None else records.count(end),
    )
