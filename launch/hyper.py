"""What a sweep file's `get_hyper(hyper)` is given: lists of runs, and ways to combine them.

A run is a dict of the trainer's flags: {"config": "configs/tiny.py:dense", "config.seed": 1}.
The names and what they mean are those of the sweep files of Google's research code
(uncertainty-baselines, init2winit): `product` lets the last list vary fastest, and `zipit` repeats
a list of one run to the length of the others.  Stricter than there: a key that two of the combined
lists set to different values is refused, and so are lists of unequal lengths.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from launch.shell import LaunchError

Run = dict[str, Any]
Runs = list[Run]


def sweep(key: str, values: Iterable[Any]) -> Runs:
    """One run for each value."""
    return [{key: value} for value in values]


def fixed(key: str, value: Any, length: int = 1) -> Runs:
    """`length` runs (normally one) with this value."""
    return [{key: value} for _ in range(length)]


def product(lists: Sequence[Sequence[Run]]) -> Runs:
    """Every combination of one run from each list."""
    return [_merge(runs) for runs in itertools.product(*lists)]


def zipit(lists: Sequence[Sequence[Run]]) -> Runs:
    """The first runs of all lists together, then the second ones, and so on.

    Raises:
      LaunchError: the lists differ in length; one of length 1 is repeated instead.
    """
    lengths = {len(runs) for runs in lists} - {1}
    if len(lengths) > 1:
        raise LaunchError(
            f"hyper.zipit is given lists of {' and '.join(map(str, sorted(lengths)))} runs: give "
            f"all of them the same length, or length 1."
        )
    length = lengths.pop() if lengths else min(len(lists), 1)
    return [_merge([runs[i % len(runs)] for runs in lists]) for i in range(length)]


def chainit(lists: Iterable[Iterable[Run]]) -> Runs:
    """The runs of the first list, then those of the second, and so on."""
    return [run for runs in lists for run in runs]


def _merge(runs: Iterable[Run]) -> Run:
    merged: Run = {}
    for run in runs:
        for key, value in run.items():
            if key in merged and merged[key] != value:
                raise LaunchError(
                    f"{key} is {merged[key]!r} in one part of a run and {value!r} in another: "
                    f"set it once."
                )
            merged[key] = value
    return merged
