"""Draws the loss and the dropped share of one run, as the README shows them of the first run.

python -m benchmarks.plot_run --workdir=runs/tiny --output=docs/images/tiny.png

Reads WORKDIR/metrics.jsonl.  Needs matplotlib (extra `plots`).
"""

import argparse
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

from moe_jax.files import json_files, records

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    """Reads the flags, draws, writes the picture."""
    parser = argparse.ArgumentParser(description="Draws the loss and drops of a run.")
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    given = parser.parse_args()
    lines = json_files.read_lines(given.workdir / "metrics.jsonl")
    draw(list(records.parse_lines(lines, records.mapping)), given.output)


def draw(rows: Sequence[Mapping[str, Any]], output: pathlib.Path) -> None:
    """Write the picture: losses on the left, dropped assignments on the right.

    Args:
      rows: of metrics.jsonl, of training steps and of evaluations.
      output: a file whose suffix names the format.
    """
    steps = [row for row in rows if "lm_loss" in row]
    evals = [row for row in rows if "eval_loss" in row]
    figure, (loss, drops) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    at = [row["step"] for row in steps]
    held = [row["step"] for row in evals]
    loss.plot(at, [row["lm_loss"] for row in steps], label="training")
    loss.plot(held, [row["eval_loss"] for row in evals], "o", label="held out")
    loss.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None))
    drops.plot(at, [100 * row["drop_fraction"] for row in steps], label="training")
    drops.plot(held, [100 * row["eval_drop_fraction"] for row in evals], "o", label="held out")
    drops.set(xlabel="step", ylabel="dropped assignments (%)", ylim=(0, None))
    for axes in (loss, drops):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(output, dpi=100)


if __name__ == "__main__":
    main()
