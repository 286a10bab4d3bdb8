"""Shows a run on standard output: a progress bar on a terminal, otherwise one line per row."""

import sys
from collections.abc import Mapping
from typing import Any, Protocol

import rich.console
import rich.progress
from rich.table import Column

from moe_jax.files.formats import count, duration, epochs, or_dash

FIRST = 5.0  # seconds of a wait until its first line; the time of each later line doubles
LONGEST = 300.0  # maximum of seconds between two such lines
_BAR = 16  # characters of the bar


class Screen(Protocol):
    """Shows the progress of a run to the user."""

    def begin(self, total: int, done: int) -> None:
        """Show that training begins: `total` steps, of which `done` are done."""

    def show(self, row: Mapping[str, Any]) -> None:
        """Show a row of metrics.jsonl."""

    def say(self, text: str) -> None:
        """Show a line that remains visible."""

    def waiting(self, what: str, seconds: float) -> None:
        """Show that the run has waited `seconds` for `what`; called every second of a wait.

        An empty `what`: the wait is over.
        """

    def close(self) -> None:
        """End the display."""


def open_screen() -> Screen:
    """A progress bar if standard output is a terminal, else plain lines."""
    return Bar() if sys.stdout.isatty() else PlainLines()


class Silent:
    """The screen of every process but the lead: it shows nothing."""

    def begin(self, total: int, done: int) -> None:
        """Do nothing."""

    def show(self, row: Mapping[str, Any]) -> None:
        """Do nothing."""

    def say(self, text: str) -> None:
        """Do nothing."""

    def waiting(self, what: str, seconds: float) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class PlainLines:
    """One line per row, and for a long wait a line at growing intervals."""

    def __init__(self):
        self._total, self._stream = 0, sys.stdout
        self._waited, self._due = 0.0, FIRST

    def begin(self, total: int, done: int) -> None:
        self._total = total

    def show(self, row: Mapping[str, Any]) -> None:
        if "eval_loss" in row:
            self.say(eval_line(row, self._total))
        if "loss" in row:
            self.say(train_line(row, self._total))

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def waiting(self, what: str, seconds: float) -> None:
        if seconds < self._waited:  # another wait
            self._due = FIRST
        self._waited = seconds
        if what and seconds >= self._due:
            self.say(f"{what}: {seconds:.0f} s so far")
            self._due = seconds + min(seconds, LONGEST)

    def close(self) -> None:
        """Do nothing: lines need no end."""


class Bar:
    """A progress bar on a terminal; permanent lines are printed above it."""

    def __init__(self):
        self._total, self._line = 0, ""
        self._bar = rich.progress.Progress(
            rich.progress.BarColumn(_BAR, table_column=Column(width=_BAR)),
            # Cut off on a narrow terminal, because rich would not redraw a second line.
            rich.progress.TextColumn(
                "{task.description}",
                markup=False,
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
            console=rich.console.Console(file=sys.stdout),
            expand=True,  # the bar keeps its width, the text gets the rest
        )
        self._task = self._bar.add_task("", total=None)
        self._bar.start()

    def begin(self, total: int, done: int) -> None:
        self._total, self._line = total, f"step {done}/{total}"
        self._bar.update(self._task, total=total, completed=done, description=self._line)

    def show(self, row: Mapping[str, Any]) -> None:
        if "eval_loss" in row:
            self.say(eval_line(row, self._total))
        if "loss" in row:
            self._line = bar_line(row, self._total)
        self._bar.update(self._task, completed=row["step"], description=self._line)

    def say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def waiting(self, what: str, seconds: float) -> None:
        step = self._line.partition("  ")[0]
        wait = f"{what} {seconds:.0f} s"
        line = "  ".join(part for part in (step, wait) if part) if what else self._line
        self._bar.update(self._task, description=line)

    def close(self) -> None:
        self._bar.stop()


def train_line(row: Mapping[str, Any], total_steps: int) -> str:
    """One line such as `step 40/200  loss 3.1234  lm 3.1001  tok/s 21.3k  mfu -  drop 1.2%  ...`.

    A value that is missing from the row, or None, is shown as `-`.
    """
    seconds, left = row.get("step_seconds"), max(0, total_steps - row["step"])
    return "  ".join(
        (
            f"step {row['step']}/{total_steps}",
            f"loss {_loss(row.get('loss'))}",
            f"lm {_loss(row.get('lm_loss'))}",
            f"tok/s {or_dash(row.get('tokens_per_second'), count)}",
            f"mfu {or_dash(row.get('mfu'), '{:.1%}'.format)}",
            f"drop {or_dash(row.get('drop_fraction'), '{:.1%}'.format)}",
            *epochs(row.get("epochs")),
            f"eta {or_dash(seconds, lambda seconds: duration(seconds * left, units=2))}",
        )
    )


def bar_line(row: Mapping[str, Any], total_steps: int) -> str:
    """The parts of `train_line` that have a value, with the remaining time first."""
    step, *parts, eta = train_line(row, total_steps).split("  ")
    return "  ".join((step, eta, *(part for part in parts if not part.endswith(" -"))))


def eval_line(row: Mapping[str, Any], total_steps: int) -> str:
    """One line with every `eval_*` number of a row."""
    parts = [
        f"{name} {value if isinstance(value, int) else _loss(value)}"
        for name, value in row.items()
        if name.startswith("eval_") and not isinstance(value, Mapping | list)
    ]
    return "  ".join((f"step {row['step']}/{total_steps}", *parts))


def _loss(value: Any) -> str:
    """Format a loss; a row holds a number that is not finite as a string."""
    return value if isinstance(value, str) else or_dash(value, "{:.4f}".format)
