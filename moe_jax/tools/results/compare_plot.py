"""Plots held-out loss over steps and over training time, with the baseline's final loss."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax.tools.results.compare import Comparison, seconds_until
from moe_jax.tools.results.figure import (
    HELDOUT_LOSS,
    add_legend,
    line_styles,
    new_figure,
    save_figure,
)
from moe_jax.tools.results.group import Group
from moe_jax.tools.results.label import short_labels
from moe_jax.tools.results.read import Result

_EARLY = 0.2  # share of a run's steps whose higher losses may lie above the panels
_UNITS = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


def write_compare_plot(path: Path, whole: Comparison) -> None:
    """Draw the mean held-out curve of each configuration and a line at the baseline's final loss.

    Args:
      path: the file; its end names the format.
      whole: the comparison.

    Raises:
      UserError: matplotlib is missing, or the file cannot be written.
    """
    groups = [whole.baseline, *(each.group for each in whole.others)]
    names = short_labels([each.settings for each in groups], [g.runs[0].name for g in groups])
    names[0] += " (baseline)"
    figure = new_figure(entries=len(groups) + 1)
    over_steps, over_time = figure.subplots(1, 2, sharey=True)
    unit, unit_name = _unit(groups)
    for each, name, style in zip(groups, names, line_styles(len(groups)), strict=True):
        _draw(over_steps, _points(each.runs), name, style)
        _draw(over_time, _points(each.runs, unit), name, style)
    for axes in (over_steps, over_time):
        label = f"L* = {whole.loss:.4f}"
        axes.axhline(whole.loss, color="black", linewidth=1, linestyle=(0, (4, 2)), label=label)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    low = min(whole.loss, *(loss for each in groups for _, loss in _points(each.runs)))
    top = max(whole.loss, *(_after_start(each.runs) for each in groups))
    margin = 0.05 * (top - low) or 0.1
    over_steps.set_ylim(low - margin, top + margin)
    over_steps.set_xlabel("steps")
    over_steps.set_ylabel(HELDOUT_LOSS)
    over_time.set_xlabel(f"training time ({unit_name}, without evaluations and saves)")
    add_legend(figure, over_steps, "configuration")
    figure.suptitle(
        "Held-out loss until the baseline's final loss", x=0.01, horizontalalignment="left"
    )
    save_figure(figure, path)


def _draw(
    axes: Any, points: Sequence[tuple[float, float]], name: str, style: Mapping[str, str]
) -> None:
    axes.plot(
        [at for at, _ in points], [loss for _, loss in points], marker=".", label=name, **style
    )


def _points(runs: Sequence[Result], unit: float | None = None) -> list[tuple[float, float]]:
    """Means over seeds of (steps, loss), or of (time, loss) if there is a unit in seconds.

    Only evaluations that every seed has, because else the mean would jump.
    """
    curves = [dict(run.heldout) for run in runs]
    found = []
    for step in sorted(set.intersection(*(set(curve) for curve in curves))):
        at = float(step)
        if unit is not None:
            times = [seconds_until(run, step) for run in runs]
            if None in times:
                continue
            at = statistics.mean(time for time in times if time is not None) / unit
        found.append((at, statistics.mean(curve[step] for curve in curves)))
    return found


def _after_start(runs: Sequence[Result]) -> float:
    """The highest loss after the first fifth of the steps."""
    points = _points(runs)
    return max(loss for at, loss in points if at >= _EARLY * points[-1][0])


def _unit(groups: Sequence[Group]) -> tuple[float, str]:
    """The unit of time in which the longest run has at least two: (seconds, name)."""
    longest = max((run.seconds[-1][1] for g in groups for run in g.runs if run.seconds), default=0)
    return next((unit for unit in _UNITS if longest >= 2 * unit[0]), _UNITS[-1])
