"""Draws a bar per attempt, divided by category.

A pause is not drawn, because goodput does not count it, and a gap longer than the longest attempt
is cut, because days without a process would shrink all other bars.  The labels beside the bars give
the length of both.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from moe_jax.errors import UserError
from moe_jax.files.formats import duration
from moe_jax.tools.goodput.account import GAPS, INIT, Account, Attempt
from moe_jax.tools.goodput.show import ending

# Category -> colour, in the order of an attempt's time.  Useful time is green, lost time is red.
_COLOURS = {
    "restart": "silver",
    INIT: "C5",
    "compile": "C4",
    "step": "C2",
    "lost": "C3",
    "data": "C0",
    "checkpoint": "C1",
    "evaluation": "C9",
    "other": "C7",
}
_MAX_NAMED = 36  # most labels; with more attempts, only every n-th has one
_UNITS = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0))
_HIGHEST, _LOWEST = 10.0, 1.2  # inches


def write_plot(path: Path, account: Account) -> None:
    """Plot the length of each attempt, including the gap before it.

    Raises:
      UserError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'moe_jax[plots]'.") from None
    attempts = account.attempts
    height = min(_HIGHEST, _LOWEST + 0.3 * len(attempts))
    figure = Figure(figsize=(10, height + 0.8), layout="constrained")
    axes = figure.subplots()
    places = range(1, len(attempts) + 1)
    left = [0.0] * len(attempts)
    longest = max(attempt.own for attempt in attempts)
    unit, size = next(((u, s) for u, s in _UNITS if longest >= 2 * s), ("seconds", 1.0))
    whole = account.whole - account.seconds["paused"]
    for name, colour in _COLOURS.items():
        most = longest if name in GAPS else math.inf
        lengths = [min(most, attempt.seconds[name]) / size for attempt in attempts]
        if any(lengths):
            label = f"{name} {account.seconds[name] / whole:.1%}"
            axes.barh(places, lengths, left=left, color=colour, label=label, height=0.7)
        left = [before + more for before, more in zip(left, lengths, strict=True)]
    every = -(-len(attempts) // _MAX_NAMED)
    named = list(places)[::every]
    axes.set_yticks(named, [_name(attempts, place, longest) for place in named], fontsize="small")
    axes.set_ylim(len(attempts) + 0.6, 0.4)
    axes.set_xlabel(unit)
    axes.set_title(f"goodput {account.goodput:.1%}: time of each attempt by category")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(
        loc="outside right upper",
        title="share of the time",
        alignment="left",
        frameon=False,
        fontsize="small",
    )
    try:
        # With an explicit format, matplotlib does not append a suffix to the path.
        figure.savefig(path, dpi=110, format=path.suffix[1:] or "png")
    except (OSError, ValueError) as error:
        raise UserError(f"--plot={path} cannot be written ({error}).") from None


def _name(attempts: Sequence[Attempt], place: int, longest: float) -> str:
    """A label such as `3 (2d later): exit 42`, with the gap if its bar does not show it.

    `place` counts from 1.
    """
    attempt = attempts[place - 1]
    seconds = attempt.seconds["paused"]
    if attempt.seconds["restart"] > longest:
        seconds += attempt.seconds["restart"]
    later = f" ({duration(seconds, units=1)} later)" if seconds >= 1 else ""
    return f"{place}{later}: {ending(attempt, place == len(attempts))}"
