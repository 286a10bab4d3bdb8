"""Plots held-out loss against compute, and the best loss of each configuration over seeds."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_jax.errors import UserError
from moe_jax.files.formats import count
from moe_jax.tools.results.figure import (
    HELDOUT_LOSS,
    add_legend,
    is_wide,
    line_styles,
    new_figure,
    save_figure,
)
from moe_jax.tools.results.group import Group, sample_fault
from moe_jax.tools.results.label import short_labels

_RATE = "learning_rate"  # keys with this ending are usually varied by factors: logarithmic axis


def write_plot(path: Path, groups: Sequence[Group], x: str = "") -> None:
    """Draw loss curves, and best losses over config key `x` (empty: by configuration).

    Lines and points are means over seeds, bands and bars are one sample standard deviation.  If
    runs were evaluated on different samples, the title says so.

    Raises:
      UserError: matplotlib is missing, there is nothing to plot, or the file cannot be written.
    """
    if not groups:
        raise UserError("--plot has nothing to show: no run is finished. Leave --plot out.")
    if x:
        _check_key(x, groups)
    names = short_labels(
        [each.settings for each in groups],
        [each.runs[0].name for each in groups],
    )
    styles = line_styles(len(groups))
    figure = new_figure(entries=len(groups))
    curves, best = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_curves(curves, groups, names, styles)
    if x:
        _draw_over(best, groups, x)
    else:
        _draw_best(best, groups, styles)
    add_legend(figure, curves, "configuration (parameters)")
    figure.suptitle(_title(groups), x=0.01, horizontalalignment="left")
    save_figure(figure, path)


def _title(groups: Sequence[Group]) -> str:
    unlike = "\nDIFFERENT held-out samples: do not rank them" if sample_fault(groups) else ""
    return f"{_counted(groups)}{unlike}"


def _counted(groups: Sequence[Group]) -> str:
    counts = sorted({len(each.runs) for each in groups})
    title = f"Held-out loss of {len(groups)} configuration{'s' * (len(groups) > 1)}"
    if counts == [1]:
        return f"{title}, one run each"
    seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    return f"{title}, means over {seeds} seeds, ± one standard deviation"


def _draw_curves(
    axes: Any, groups: Sequence[Group], names: Sequence[str], styles: Sequence[dict[str, str]]
) -> None:
    ends = []
    for number, (each, name, style) in enumerate(zip(groups, names, styles, strict=True), 1):
        points: dict[float, list[float]] = {}
        for run in each.runs:
            for flops, loss in run.curve:
                points.setdefault(flops, []).append(loss)
        # Use only points at which every seed was evaluated, because else the mean would jump.
        whole = sorted(flops for flops in points if len(points[flops]) == len(each.runs))
        mean = [statistics.mean(points[flops]) for flops in whole]
        spread = [statistics.stdev(points[f]) if len(points[f]) > 1 else 0.0 for f in whole]
        size = count(each.runs[0].parameters or 0, digits=2)
        axes.plot(whole, mean, marker=".", label=f"{number}  {name}  ({size})", **style)
        for end in zip(whole[-1:], mean[-1:], strict=True):
            axes.annotate(str(number), end, (4, -3), textcoords="offset points", fontsize="x-small")
        low = [m - s for m, s in zip(mean, spread, strict=True)]
        high = [m + s for m, s in zip(mean, spread, strict=True)]
        axes.fill_between(whole, low, high, color=style["color"], alpha=0.2, linewidth=0)
        ends += whole[-1:]
    if is_wide(ends):
        axes.set_xscale("log")
    else:
        axes.ticklabel_format(axis="x", useMathText=True)
    axes.set_xlabel("training compute (model FLOPs)")
    axes.set_ylabel(HELDOUT_LOSS)
    axes.set_title("during training")
    axes.grid(alpha=0.3)


def _draw_best(axes: Any, groups: Sequence[Group], styles: Sequence[dict[str, str]]) -> None:
    """Draw a row per configuration, numbered as in the legend."""
    for place, (each, style) in enumerate(zip(groups, styles, strict=True)):
        mean, deviation = each.spread("best_heldout") or (float("nan"), None)
        colour = style["color"]
        axes.errorbar(mean, place, xerr=deviation, fmt="o", capsize=4, color=colour)
        each_run = [run.best_heldout for run in each.runs]
        axes.plot(each_run, [place] * len(each_run), ".", color=colour, alpha=0.4)
    axes.set_yticks(range(len(groups)), [str(number + 1) for number in range(len(groups))])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlabel(HELDOUT_LOSS)
    axes.set_title("best (faint: single runs)" if _has_seeds(groups) else "best")
    axes.grid(alpha=0.3)


def _has_seeds(groups: Sequence[Group]) -> bool:
    return any(len(each.runs) > 1 for each in groups)


def _draw_over(axes: Any, groups: Sequence[Group], x: str) -> None:
    """A line for each setting of all other keys."""
    lines: dict[str, list[Group]] = {}
    for each in groups:
        if x in each.settings:
            lines.setdefault(each.label(without=x), []).append(each)
    for number, (label, members) in enumerate(lines.items()):
        members.sort(key=lambda each: each.settings[x])
        spreads = [each.spread("best_heldout") or (float("nan"), None) for each in members]
        axes.errorbar(
            [each.settings[x] for each in members],
            [mean for mean, _ in spreads],
            yerr=[deviation or 0.0 for _, deviation in spreads],
            marker="o",
            capsize=4,
            color=f"C{number % 10}",
            label=label,
        )
    values = sorted(each.settings[x] for each in groups if x in each.settings)
    if is_wide(values) or (x.endswith(_RATE) and values[0] > 0):
        axes.set_xscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(HELDOUT_LOSS)
    axes.set_title("best")
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(
            frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16)
        )


def _check_key(x: str, groups: Sequence[Group]) -> None:
    found = [each.settings[x] for each in groups if x in each.settings]
    numbers = [value for value in found if isinstance(value, int | float)]
    if not found or len(numbers) < len(found):
        known = sorted({key for each in groups for key in each.settings})
        raise UserError(
            f"--x={x} is not a key with numbers that these runs vary: use one of "
            f"{', '.join(known) or 'none'}."
        )
