"""Adds up the rows of goodput.jsonl to seconds per category, which sum to the whole time."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from moe_jax.errors import UserError
from moe_jax.files import json_files, records
from moe_jax.files.workdir import Folder
from moe_jax.watch.timekeeper import GOODPUT, INIT

# Category -> its meaning.  Every moment from the first start to the last row is in one category.
CATEGORIES = {
    "step": "steps that the run kept",
    "lost": "steps repeated after a restart",
    "data": "devices idle, waiting for a batch",
    "compile": "compiling the train step",
    "checkpoint": "training blocked by a save",
    "evaluation": "held-out loss, samples",
    INIT: "from a process's start to its state on the devices",
    "restart": "from the last row of an attempt to the next start",
    "paused": "from an exit with code 0 to the next start",
    "other": "anything else, including a suspended machine",
}
GAPS = ("restart", "paused")
_MEASURED = ("step", "data", "compile", "checkpoint", "evaluation", INIT)
_LATEST = 1e11  # seconds since 1970, about 3000 years; a later time is invalid


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One process of a run, and the gap before it (`GAPS`) in which no process ran."""

    began: float  # seconds since 1970
    resumed: int  # the step it resumed from
    reached: int  # the last step it finished
    kept: int  # the last of its steps that no later attempt repeated
    end: int | None  # exit code; None: not recorded (killed, or still running)
    seconds: dict[str, float]  # by category

    @property
    def gap(self) -> float:
        """The seconds of the gap before it."""
        return math.fsum(self.seconds[name] for name in GAPS)

    @property
    def own(self) -> float:
        """The seconds from its start to its last row."""
        return math.fsum(time for name, time in self.seconds.items() if name not in GAPS)


@dataclasses.dataclass(frozen=True)
class Account:
    """The attempts of a run, in order."""

    attempts: list[Attempt]
    unreadable: int  # lines that are not rows

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds per category, summed over all attempts."""
        return {
            name: math.fsum(attempt.seconds[name] for attempt in self.attempts)
            for name in CATEGORIES
        }

    @property
    def whole(self) -> float:
        """The seconds from the first start to the last row."""
        return math.fsum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """The share of the time, without pauses, that went into steps that the run kept."""
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
    """The rows of one attempt; `taken`: (last step, seconds of steps so far) of each row."""

    began: float
    resumed: int
    seconds: dict[str, float]
    whole: float
    end: int | None
    taken: list[tuple[int, float]]


def read(path: Folder) -> Account:
    """Read the account from WORKDIR/goodput.jsonl.

    Raises:
      UserError: there is no such file, or it has no row.
    """
    try:
        lines = json_files.read_lines(path)
    except FileNotFoundError:
        raise UserError(f"There is no {path}: set --workdir to the one of a run.") from None
    found = account(lines)
    if not found.attempts:
        raise UserError(f"{path} has no row of {GOODPUT}: set --workdir to the one of a run.")
    return found


def account(lines: Sequence[bytes]) -> Account:
    """Add up `lines`; lines that are not rows are skipped and counted.

    An attempt lasts from its start to its last row.  The time from there to the next start is
    `restart`, which includes what a killed attempt did after its last row (at most `BEAT` seconds
    or a `SHARE` of its age).  After an attempt that finished, or that a STOP file ended, the time
    is `paused`.  A clock that goes backwards makes both shorter, never negative.
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
        # An attempt starts before the last one ended if the clock was set back, or if one process
        # makes several runs.  The overlap is counted in the earlier attempt.
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
    """Summarise the rows of one attempt; the seconds of each row count from its start."""
    first, last = rows[0], rows[-1]
    measured = math.fsum(last.seconds.values())
    taken = [(row.step, row.seconds.get("step", 0.0)) for row in rows]
    whole = max(measured, last.time - first.began)
    return _Span(first.began, first.resumed, last.seconds, whole, last.end, taken)


def _kept(spans: Sequence[_Span]) -> Iterator[tuple[float, int]]:
    """For each attempt: the seconds of its lost steps, and its last step that was kept."""
    found = []
    limit = math.inf  # later attempts repeated every step after this one
    for span in reversed(spans):
        before, lost = limit, 0.0
        for (start, since), (stop, until) in reversed(list(itertools.pairwise(span.taken))):
            seconds = max(0.0, until - since)
            if stop < start:  # a rewind within the attempt
                lost += seconds
                limit = min(limit, stop)
            elif stop > start:
                lost += seconds * min(1.0, max(0.0, stop - max(start, limit)) / (stop - start))
            elif stop >= limit:  # running the step after `stop`
                lost += seconds
        found.append((lost, int(min(span.taken[-1][0], before))))
        limit = min(limit, span.resumed)
    return reversed(found)


def _row(value: Any) -> _Row:
    """Parse a row; ValueError if an attempt cannot have written it."""
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
