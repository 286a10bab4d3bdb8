"""Formats results as Markdown tables, and writes them as CSV."""

import csv
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from moe_jax.errors import UserError
from moe_jax.files.formats import count, or_dash, table
from moe_jax.tools.results.group import Group, Spread, labels, ranks
from moe_jax.tools.results.read import Result

_short = partial(count, digits=2)
# attribute of Result -> (heading, format of a number)
_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "best_heldout": ("held-out loss", "{:.4f}".format),
    "best_nodrop": ("without drops", "{:.4f}".format),
    "heldout_rows": ("held-out rows", "{:,.0f}".format),
    "train_loss": ("train loss", "{:.4f}".format),
    "tokens_per_second": ("tokens/s", "{:,.0f}".format),
    "drop_fraction": ("dropped", "{:.1%}".format),
    "parameters": ("parameters", _short),
    "active": ("active", _short),
    "flops_per_token": ("FLOPs/token", _short),
    "flops": ("FLOPs", "{:.2e}".format),
}
_WITH_DEVIATION = ("best_heldout", "best_nodrop", "train_loss")
NOTE = (
    "Losses in nats per token. Held-out loss: best evaluation at the eval capacity. Without drops: "
    "best evaluation without drops. Train loss: last accepted step, without auxiliary losses. "
    "Held-out rows: size of the evaluation sample. Tokens/s and dropped: medians of the log steps. "
    "FLOPs: model FLOPs."
)


def runs_table(results: Sequence[Result]) -> str:
    """Format one line per run, with `-` for a missing number."""
    label = labels(results)
    rows = [["run", "config", "seed", "state", *(heading for heading, _ in _COLUMNS.values())]]
    for run in results:
        seed = "-" if run.config is None else str(run.config.seed)
        numbers = [or_dash(getattr(run, name), form) for name, (_, form) in _COLUMNS.items()]
        rows.append([run.name, label.get(run.name, "-"), seed, _one_line(run.state), *numbers])
    return table(rows, left=2)


def groups_table(groups: Sequence[Group]) -> str:
    """Format one line per configuration: means over seeds, `±` one sample standard deviation.

    `rank` is by held-out loss, or `-` if the samples differ (`sample_fault` says how).
    """
    rows = [["config", "rank", "runs", *(heading for heading, _ in _COLUMNS.values())]]
    for each, rank in zip(groups, ranks(groups), strict=True):
        numbers = [_spread(each.spread(name), name) for name in _COLUMNS]
        rows.append([each.label(), or_dash(rank, str), str(len(each.runs)), *numbers])
    return table(rows, left=1)


def write_csv(path: Path, results: Sequence[Result]) -> None:
    """Write one line per run, numbers with all digits; a missing number is an empty cell.

    Raises:
      UserError: the file cannot be written.
    """
    label = labels(results)
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["run", "config", "seed", "state", *_COLUMNS])
            for run in results:
                seed = None if run.config is None else run.config.seed
                numbers = (getattr(run, name) for name in _COLUMNS)
                writer.writerow([run.name, label.get(run.name), seed, run.state, *numbers])
    except OSError as error:
        raise UserError(f"--csv={path} cannot be written ({error.strerror}).") from None


def _spread(spread: Spread | None, name: str) -> str:
    form = _COLUMNS[name][1]
    if spread is None:
        return "-"
    if spread.deviation is None or name not in _WITH_DEVIATION:
        return form(spread.mean)
    return f"{form(spread.mean)} ± {form(spread.deviation)}"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")
