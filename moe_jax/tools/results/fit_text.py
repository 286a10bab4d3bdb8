"""Formats a fitted scaling law as text."""

import numpy as np

from moe_jax.errors import one_line
from moe_jax.files.formats import count, table
from moe_jax.tools.results.fit import DELTA, Fit, HeldOut
from moe_jax.tools.results.fit_runs import FitReport

FIT_NOTE = (
    "N: active parameters outside embedding table and output head. E: num_experts / K, experts per "
    "choice; 1 for a dense model. D: tokens of all steps. Loss: last evaluation (eval_loss), nats "
    "per token."
)


def fit_text(report: FitReport) -> str:
    """Format a fit: the law, its coefficients, a table of the runs, and notes.

    Args:
      report: the fit and its data.

    Returns:
      Several lines, with Markdown tables.
    """
    found = report.found
    parts = [
        f"{found.law.name}: {found.law.formula}\n{_method(found, len(report.runs))}",
        _coefficients(found),
        _runs(report),
        _held_out(report),
        FIT_NOTE,
        *map(one_line, report.left_out),
    ]
    return "\n\n".join(parts)


def _method(found: Fit, runs: int) -> str:
    start, maximum = found.saturation
    experts = f" Ê saturates from E_start {start:g} to E_max {maximum:g}."
    resamples = f"90% intervals from {found.resamples} resamples of the runs"
    if not found.intervals:
        resamples = f"no intervals, because {found.resamples} resamples determine all coefficients"
    return (
        f"{runs} runs, Huber loss (delta {DELTA:g}) of log L, {resamples}."
        f"{experts * ('E' in found.law.least)}"
    )


def _coefficients(found: Fit) -> str:
    rows = [["coefficient", "value", "5%", "95%"]]
    for name, value in found.values.items():
        bounds = found.intervals.get(name, ())
        rows.append([name, f"{value:.4g}", *(f"{bound:.4g}" for bound in bounds or ())])
        rows[-1] += ["-"] * (4 - len(rows[-1]))
    return table(rows, left=1)


def _runs(report: FitReport) -> str:
    found = report.found
    rows = [["run", "N", "E", "D", "loss", "fitted", "residual"]]
    for place, run in enumerate(report.runs):
        n, e, d, loss = (float(x[place]) for x in (report.n, report.e, report.d, report.loss))
        fitted = float(found.fitted[place])
        sizes = [count(n, digits=2), f"{e:g}", count(d, digits=2)]
        losses = [f"{loss:.4f}", f"{fitted:.4f}", _percent(loss / fitted - 1)]
        rows.append([run.name, *sizes, *losses])
    return table(rows, left=1)


def _held_out(report: FitReport) -> str:
    held = report.found.held_out
    if not isinstance(held, HeldOut):
        return f"held out: no check, because {held}"
    rows = [["held out (largest N)", "loss", "predicted", "error"]]
    for place, predicted, error in zip(held.runs, held.predicted, held.error, strict=True):
        loss = f"{report.loss[place]:.4f}"
        name = report.runs[int(place)].name
        rows.append([name, loss, f"{predicted:.4f}", _percent(error)])
    mean = 100 * float(np.abs(held.error).mean())
    return f"{table(rows, left=1)}\n\nmean absolute error of the largest size: {mean:.2f}%"


def _percent(share: float) -> str:
    return f"{round(100 * float(share), 2) + 0.0:+.2f}%"  # + 0.0: no negative zero
