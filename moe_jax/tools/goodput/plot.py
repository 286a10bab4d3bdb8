"""A bar for each attempt, divided by category."""

from pathlib import Path

from moe_jax.errors import UserError
from moe_jax.tools.goodput.account import CATEGORIES, Account
from moe_jax.tools.goodput.show import ending

# Useful time is green, lost time red; what is in between has its own colours.
_COLOURS = ("C2", "C3", "C0", "C4", "C1", "C9", "C5", "silver", "whitesmoke", "C7")
_UNITS = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0))
_HIGHEST, _LOWEST = 30.0, 1.2  # inches


def write_plot(path: Path, account: Account) -> None:
    """The length of each attempt, the gap before it included.

    Raises:
      UserError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'moe_jax[plots]'.") from None
    attempts = account.attempts
    height = min(_HIGHEST, _LOWEST + 0.3 * len(attempts))
    figure = Figure(figsize=(9, height + 0.8), layout="constrained")
    axes = figure.subplots()
    places = range(1, len(attempts) + 1)
    left = [0.0] * len(attempts)
    longest = max(attempt.gap + attempt.own for attempt in attempts)
    unit, size = next(((u, s) for u, s in _UNITS if longest >= 2 * s), ("seconds", 1.0))
    for name, colour in zip(CATEGORIES, _COLOURS, strict=True):
        lengths = [attempt.seconds[name] / size for attempt in attempts]
        if any(lengths):
            axes.barh(places, lengths, left=left, color=colour, label=name, height=0.7)
        left = [before + more for before, more in zip(left, lengths, strict=True)]
    names = [
        f"{number}: {ending(attempt, number == len(attempts))}"
        for number, attempt in enumerate(attempts, 1)
    ]
    axes.set_yticks(places, names, fontsize="small")
    axes.set_ylim(len(attempts) + 0.6, 0.4)
    axes.set_xlabel(unit)
    axes.set_title(f"goodput {account.goodput:.1%}: where the time of each attempt went")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(
        loc="outside lower center", ncols=len(CATEGORIES), frameon=False, fontsize="small"
    )
    try:
        # With a format matplotlib adds no suffix, so a folder or a bare name is what it says.
        figure.savefig(path, dpi=110, format=path.suffix[1:] or "png")
    except (OSError, ValueError) as error:
        raise UserError(f"--plot={path} cannot be written ({error}).") from None
