"""Formats an account as tables and as JSON."""

import datetime
import json
import math
from collections.abc import Sequence

from moe_jax.files.formats import duration, table
from moe_jax.tools.goodput.account import CATEGORIES, Account, Attempt


def report(account: Account) -> str:
    """Format the tables; seconds and percentages each add up to the last digit shown."""
    seconds = account.seconds
    tenths = apportion(list(seconds.values()), round(10 * account.whole))
    shares = apportion(list(seconds.values()), 1000)
    rows = [["category", "what", "seconds", "%"]]
    for (name, what), time, share in zip(CATEGORIES.items(), tenths, shares, strict=True):
        rows.append([name, what, f"{time / 10:,.1f}", f"{share / 10:.1f}"])
    rows.append(["all", "", f"{sum(tenths) / 10:,.1f}", f"{sum(shares) / 10:.1f}"])
    meant = duration(account.whole - seconds["paused"])
    parts = [
        table(rows, left=2),
        _attempts(account.attempts),
        f"goodput: {account.goodput:.1%} of {meant} went into steps that the run kept"
        + (" (without pauses)" if seconds["paused"] else ""),
    ]
    if account.unreadable:
        many = account.unreadable > 1
        parts.append(f"{account.unreadable} unreadable line{'s' * many} skipped")
    return "\n\n".join(parts)


def as_json(account: Account) -> str:
    """Format the same numbers as JSON, with all digits."""
    return json.dumps(
        {
            "whole_seconds": account.whole,
            "goodput": account.goodput,
            "seconds": account.seconds,
            "attempts": [
                {
                    "began": attempt.began,
                    "resumed_from": attempt.resumed,
                    "reached": attempt.reached,
                    "lost_steps": lost_steps(attempt),
                    "exit_code": attempt.end,
                    "seconds": attempt.seconds,
                }
                for attempt in account.attempts
            ],
            "unreadable_lines": account.unreadable,
        }
    )


def _attempts(attempts: Sequence[Attempt]) -> str:
    heading = ["attempt", "began (UTC)", "ended", "from", "reached", "lost", "gap before"]
    rows = [[*heading, "time", "step %"]]
    for number, attempt in enumerate(attempts, 1):
        useful = f"{100 * attempt.seconds['step'] / attempt.own:.1f}" if attempt.own else "-"
        rows.append(
            [
                str(number),
                _date(attempt.began),
                ending(attempt, number == len(attempts)),
                f"{attempt.resumed:,}",
                f"{attempt.reached:,}",
                f"{lost_steps(attempt):,}",
                duration(attempt.gap),
                duration(attempt.own),
                useful,
            ]
        )
    return table(rows, left=3)


def ending(attempt: Attempt, last: bool) -> str:
    """Describe how an attempt ended."""
    if attempt.end is None:
        return "killed or running" if last else "killed"
    return f"exit {attempt.end}"


def lost_steps(attempt: Attempt) -> int:
    """The number of steps that it finished and that a later attempt repeated."""
    return max(0, attempt.reached - max(attempt.kept, attempt.resumed))


def apportion(parts: Sequence[float], units: int) -> list[int]:
    """Divide `units` in proportion to `parts`, in integers: the largest remainders round up.

    All are 0 if the sum of `parts` is 0.
    """
    whole = math.fsum(parts)
    if not whole:
        return [0] * len(parts)
    exact = [part / whole * units for part in parts]
    floors = [math.floor(value) for value in exact]
    order = sorted(range(len(parts)), key=lambda i: floors[i] - exact[i])
    for i in order[: units - sum(floors)]:
        floors[i] += 1
    return floors


def _date(seconds: float) -> str:
    date = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return date.strftime("%Y-%m-%d %H:%M:%S")
