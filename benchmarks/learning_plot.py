"""Draws the held-out loss of the screening of docs/learning.md, and the load of its routers.

python -m benchmarks.learning_plot --output=docs/images/learning.png

Reads docs/data/learning/*.jsonl.  Needs matplotlib (extra `plots`).
"""

import argparse
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

from moe_jax.files import json_files, records

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DATA = pathlib.Path(__file__).parents[1] / "docs" / "data" / "learning"
LABELS = {
    "dense": "dense",
    "e8k2": "8 experts, K 2",
    "e32k2": "32 experts, K 2",
    "e64k2": "64 experts, K 2",
    "switch": "switch, 64",
    "switch-first-dense": "switch, 64, first layer dense",
    "switch-sum": "switch, 64, balance loss x 8",
}


def main() -> None:
    """Reads the flags, draws, writes the picture."""
    parser = argparse.ArgumentParser(description="Draws the screening of docs/learning.md.")
    parser.add_argument("--output", type=pathlib.Path, required=True)
    draw({name: read(DATA / f"{name}.jsonl") for name in LABELS}, parser.parse_args().output)


def read(path: pathlib.Path) -> list[Mapping[str, Any]]:
    """The rows of one run: training steps and evaluations."""
    return list(records.parse_lines(json_files.read_lines(path), records.mapping))


def draw(runs: Mapping[str, Sequence[Mapping[str, Any]]], output: pathlib.Path) -> None:
    """Write the picture: held-out losses on the left, the load of the worst layer on the right.

    Args:
      runs: name of each run -> its rows.
      output: a file whose suffix names the format.
    """
    figure, (loss, load) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, rows in runs.items():
        held = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
        (line,) = loss.plot(*zip(*held, strict=True), "o-", markersize=3, label=LABELS[name])
        loads = [
            (row["step"], max(row["load_max_over_mean"]))
            for row in rows
            if row.get("load_max_over_mean")
        ]
        if loads:
            load.plot(*zip(*loads, strict=True), color=line.get_color())
    loss.set(xlabel="step", ylabel="held-out loss (nats per token)", xlim=(0, None))
    load.set(xlabel="step", ylabel="load max / mean, worst layer", yscale="log", xlim=(0, None))
    for axes in (loss, load):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    figure.savefig(output, dpi=100)


if __name__ == "__main__":
    main()
