"""Makes, styles and writes the figures of plots."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_jax.errors import UserError

HELDOUT_LOSS = "held-out loss (nats per token)"
_LINES = ("solid", "dashed", "dotted", "dashdot")  # the next style after every ten colours
_HIGHEST = 30.0  # inches


def new_figure(entries: int) -> Any:
    """Make an empty figure of two panels' width.

    Args:
      entries: lines of the legend, which the figure's height has room for.

    Returns:
      A matplotlib Figure.

    Raises:
      UserError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'moe_jax[plots]'.") from None
    return Figure(figsize=(12, min(_HIGHEST, max(4.2, 1.4 + 0.22 * entries))), layout="constrained")


def line_styles(number: int) -> list[dict[str, str]]:
    """Make the color and linestyle of each of `number` lines."""
    return [
        {"color": f"C{line % 10}", "linestyle": _LINES[line // 10 % len(_LINES)]}
        for line in range(number)
    ]


def add_legend(figure: Any, axes: Any, title: str) -> None:
    """Put the legend of one panel's lines to the right of all panels.

    Args:
      figure: a matplotlib Figure.
      axes: the panel whose labelled lines are listed.
      title: the heading of the legend.
    """
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside right center",
        title=title,
        alignment="left",
        frameon=False,
        fontsize="small",
    )


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure in the format that the end of the path names; PNG if it has none.

    Raises:
      UserError: the file cannot be written.
    """
    try:
        # With an explicit format, matplotlib does not append a suffix to the path.
        figure.savefig(path, dpi=110, format=path.suffix[1:] or "png")
    except (OSError, ValueError) as error:
        raise UserError(f"--plot={path} cannot be written ({error}).") from None


def is_wide(values: Sequence[float]) -> bool:
    """True if `values` need a logarithmic axis: positive, and largest at least 8 x smallest."""
    return bool(values) and min(values) > 0 and max(values) >= 8 * min(values)
