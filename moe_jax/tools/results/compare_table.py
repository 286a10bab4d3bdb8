"""Formats a comparison with a baseline as text."""

from moe_jax.errors import one_line
from moe_jax.files.formats import duration, or_dash, table
from moe_jax.tools.results.compare import Compared, Comparison
from moe_jax.tools.results.decay import endless
from moe_jax.tools.results.group import Spread, spread_of

_HEADINGS = (
    "config",
    "runs",
    "final loss",
    "steps to L*",
    "speed-up in steps",
    "in FLOPs",
    "in time",
)
COMPARE_NOTE = (
    "Compared: each run's own curve, under its own learning-rate schedule, at the step from which "
    "on its held-out loss stays at or below L* (linear between evaluations). A run that reaches L* "
    "in the middle of its schedule has not decayed there, so its speed-up is underestimated. "
    "Speed-up: steps, model FLOPs or time of the baseline, over those of the run until L*. Time: "
    "sum of the logged step_seconds, without compilation, evaluations and saves. "
    "± one sample standard deviation over seeds; ≥: the first evaluation is already below L*."
)


def comparison_text(whole: Comparison) -> str:
    """Format the comparison: a line about the baseline, a table, and notes.

    Args:
      whole: the comparison.

    Returns:
      Several lines; in the table, one line per configuration with means over its runs.
    """
    rows = [_HEADINGS, *(_row(each) for each in whole.others)]
    parts = [_baseline_line(whole), table(rows, left=1), COMPARE_NOTE, *_notes(whole)]
    return "\n\n".join(part for part in parts if part)


def _baseline_line(whole: Comparison) -> str:
    finals = spread_of([run.heldout[-1][1] for run in whole.baseline.runs])
    number = len(whole.baseline.runs)
    return (
        f"baseline {whole.baseline.label()}: L* = {_spread(finals, 4)}, the final held-out loss "
        f"(nats per token) of {number} run{'s' * (number > 1)}, after {whole.steps:,} steps, "
        f"{whole.flops:.2e} FLOPs and {or_dash(whole.seconds, duration)} of training."
    )


def _row(each: Compared) -> list[str]:
    finals = spread_of([run.heldout[-1][1] for run in each.group.runs])
    cells = [each.group.label(), str(len(each.speeds)), _spread(finals, 4), _steps(each)]
    bound = "≥ " * any(speed.crossing and speed.crossing.at_most for speed in each.speeds)
    for name in ("steps", "flops", "seconds"):
        spread = each.spread(name)
        cells.append("-" if spread is None else f"{bound}{_spread(spread, 2)}")
    return cells


def _steps(each: Compared) -> str:
    """The steps to L*, or by how much the runs that do not reach it end above it."""
    missed = [speed.above for speed in each.speeds if speed.crossing is None]
    if missed:
        some = f" by {len(missed)} of {len(each.speeds)}" * (len(missed) < len(each.speeds))
        return f"not reached{some}, {_spread(spread_of(missed), 4)} above"
    crossings = [speed.crossing for speed in each.speeds if speed.crossing]
    bound = "≤ " * any(crossing.at_most for crossing in crossings)
    return f"{bound}{_spread(spread_of([crossing.step for crossing in crossings]), 0)}"


def _notes(whole: Comparison) -> list[str]:
    groups = [whole.baseline, *(each.group for each in whole.others)]
    runs = [run for each in groups for run in each.runs]
    notes = []
    constant = [run for run in runs if endless(run)]
    if constant:
        named = ", ".join(f"{run.name} ({endless(run)})" for run in constant)
        notes.append(f"optimizer.schedule has no decay to a last step: {named}.")
    if len({run.step_tokens for run in runs}) > 1:
        notes.append("Tokens per step differ between these runs: compare FLOPs, not steps.")
    return [*notes, *map(one_line, whole.left_out)]


def _spread(spread: Spread | None, digits: int) -> str:
    assert spread is not None
    if spread.deviation is None:
        return f"{spread.mean:,.{digits}f}"
    return f"{spread.mean:,.{digits}f} ± {spread.deviation:,.{digits}f}"
