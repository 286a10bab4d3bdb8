"""Plots a fitted scaling law with the runs, and the runs' residuals."""

from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.files.formats import count
from moe_jax.tools.results.figure import HELDOUT_LOSS, add_legend, new_figure, save_figure
from moe_jax.tools.results.fit import HeldOut, classes, predict
from moe_jax.tools.results.fit_runs import FitReport

_MARKERS = "osD^vP*X"
_POINTS = 60  # of a drawn curve


def write_fit_plot(path: Path, report: FitReport) -> None:
    """Draw loss over N with the law's curve for each (E, D), and residuals in percent.

    Args:
      path: the file; its end names the format.
      report: the fit and its data.

    Raises:
      UserError: matplotlib is missing, or the file cannot be written.
    """
    sets = _sets(report)
    figure = new_figure(entries=len(sets) + 2)
    curves, residuals = figure.subplots(1, 2)
    for (e, d), (color, marker) in sets.items():
        _draw_set(curves, residuals, report, (e, d), color, marker)
    _draw_held_out(residuals, report)
    size = classes(report.n)
    sizes = [float(np.median(report.n[size == number])) for number in range(size.max() + 1)]
    for axes in (curves, residuals):
        axes.set_xscale("log")
        axes.set_xticks(sizes, [count(size) for size in sizes])
        axes.minorticks_off()  # the labels of minor ticks would overlap
        axes.set_xlabel("N (active parameters, without embeddings)")
        axes.grid(alpha=0.3)
    curves.set_ylabel(HELDOUT_LOSS)
    residuals.axhline(0, color="black", linewidth=1)
    residuals.set_ylabel("measured over law, less 1 (%)")
    residuals.set_title("residuals")
    curves.set_title("runs and law")
    add_legend(figure, curves, "E, D (tokens)")
    figure.suptitle(
        f"{report.found.law.name}: {report.found.law.formula}",
        x=0.01,
        horizontalalignment="left",
    )
    save_figure(figure, path)


def _sets(report: FitReport) -> dict[tuple[float, float], tuple[str, str]]:
    """(E, D) -> color by E and marker by D."""
    experts, tokens = (sorted({float(x) for x in xs}) for xs in (report.e, report.d))
    pairs = sorted({(float(e), float(d)) for e, d in zip(report.e, report.d, strict=True)})
    return {
        (e, d): (
            f"C{experts.index(e) % 10}",
            _MARKERS[tokens.index(d) % len(_MARKERS)],
        )
        for e, d in pairs
    }


def _draw_set(
    curves: Any,
    residuals: Any,
    report: FitReport,
    pair: tuple[float, float],
    color: str,
    marker: str,
) -> None:
    e, d = pair
    own = (report.e == e) & (report.d == d)
    n, loss = report.n[own], report.loss[own]
    along = np.geomspace(report.n.min() / 1.2, report.n.max() * 1.2, _POINTS)
    law = predict(report.found, along, np.full(_POINTS, e), np.full(_POINTS, d))
    curves.plot(along, law, color=color, linewidth=1)
    curves.plot(n, loss, marker, color=color, label=f"E={e:g}, D={count(d)}")
    residuals.plot(n, 100 * (loss / report.found.fitted[own] - 1), marker, color=color)


def _draw_held_out(residuals: Any, report: FitReport) -> None:
    held = report.found.held_out
    if not isinstance(held, HeldOut):
        return
    against = 100 * (report.loss[held.runs] / held.predicted - 1)
    residuals.plot(
        report.n[held.runs],
        against,
        "o",
        markersize=11,
        markerfacecolor="none",
        color="black",
        label="against the law without the largest N",
    )
    residuals.legend(
        frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16)
    )
