"""Held-out loss against compute, and the best of each configuration, seeds as error bars."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_jax.errors import UserError
from moe_jax.files.formats import count
from moe_jax.tools.results.group import Group, sample_fault

_LOSS = "held-out loss (nats a token)"


def write_plot(path: Path, groups: Sequence[Group], x: str = "") -> None:
    """Two panels: loss curves, and best losses over config key `x` (empty: by configuration).

    Lines and points are means over seeds, bands and bars one sample standard deviation.  Runs
    that were evaluated on different samples are drawn as well, and the title says so.

    Raises:
      UserError: matplotlib is missing, there is nothing to plot, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'moe_jax[plots]'.") from None
    if not groups:
        raise UserError("--plot has nothing to show: no run is at its end yet.")
    if x:
        _check_key(x, groups)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    curves, best = figure.subplots(1, 2, width_ratios=(3, 2))
    colours = {id(each): f"C{number % 10}" for number, each in enumerate(groups)}
    _draw_curves(curves, groups, colours)
    if x:
        _draw_over(best, groups, x)
    else:
        _draw_best(best, groups, colours)
    figure.suptitle(_title(groups))
    try:
        # With a format matplotlib adds no suffix, so a folder or a bare name is what it says.
        figure.savefig(path, dpi=110, format=path.suffix[1:] or "png")
    except (OSError, ValueError) as error:
        raise UserError(f"--plot={path} cannot be written ({error}).") from None


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


def _draw_curves(axes: Any, groups: Sequence[Group], colours: dict[int, str]) -> None:
    for each in groups:
        points: dict[float, list[float]] = {}
        for run in each.runs:
            for flops, loss in run.curve:
                points.setdefault(flops, []).append(loss)
        # Only where every seed was evaluated: elsewhere the mean would jump.
        whole = sorted(flops for flops in points if len(points[flops]) == len(each.runs))
        mean = [statistics.mean(points[flops]) for flops in whole]
        spread = [statistics.stdev(points[f]) if len(points[f]) > 1 else 0.0 for f in whole]
        colour = colours[id(each)]
        sizes = f"{count(each.runs[0].parameters or 0, digits=2)} parameters"
        axes.plot(whole, mean, marker=".", color=colour, label=f"{each.label()}  ({sizes})")
        low = [m - s for m, s in zip(mean, spread, strict=True)]
        high = [m + s for m, s in zip(mean, spread, strict=True)]
        axes.fill_between(whole, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.ticklabel_format(axis="x", useMathText=True)
    axes.set_xlabel("training compute (model FLOPs)")
    axes.set_ylabel(_LOSS)
    axes.set_title("during training")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")


def _draw_best(axes: Any, groups: Sequence[Group], colours: dict[int, str]) -> None:
    for place, each in enumerate(groups):
        mean, deviation = each.spread("best_heldout") or (float("nan"), None)
        axes.errorbar(mean, place, xerr=deviation, fmt="o", capsize=4, color=colours[id(each)])
        each_run = [run.best_heldout for run in each.runs]
        axes.plot(each_run, [place] * len(each_run), ".", color=colours[id(each)], alpha=0.4)
    axes.set_yticks(range(len(groups)), [each.label() for each in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlabel(_LOSS)
    axes.set_title("best (faint: single runs)")
    axes.grid(axis="x", alpha=0.3)


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
    if values[0] > 0 and values[-1] >= 8 * values[0]:
        axes.set_xscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(_LOSS)
    axes.set_title("best")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")


def _check_key(x: str, groups: Sequence[Group]) -> None:
    found = [each.settings[x] for each in groups if x in each.settings]
    numbers = [value for value in found if isinstance(value, int | float)]
    if not found or len(numbers) < len(found):
        known = sorted({key for each in groups for key in each.settings})
        raise UserError(
            f"--x={x} is not a key with numbers that these runs vary: use one of "
            f"{', '.join(known) or 'none'}."
        )
