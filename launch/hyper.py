"""Functions that make and combine lists of runs: the `hyper` of a sweep file's `get_hyper(hyper)`.

A run is a dict of the trainer's flags: {"config": "configs/tiny.py:dense", "config.seed": 1}.
Names and meanings are those of the sweep files in Google's research code (uncertainty-baselines,
init2winit): in `product` the last list varies fastest, and `zipit` repeats a list of one run to the
length of the others.  In contrast to that code, two combined lists that set a key to different
values are an error, and so are lists of unequal lengths.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from launch.shell import LaunchError

Run = dict[str, Any]
Runs = list[Run]


def sweep(key: str, values: Iterable[Any]) -> Runs:
    """Make one run per value."""
    return [{key: value} for value in values]


def fixed(key: str, value: Any, length: int = 1) -> Runs:
    """Make `length` runs (normally one) with this value."""
    return [{key: value} for _ in range(length)]


def product(lists: Sequence[Sequence[Run]]) -> Runs:
    """Combine one run from each list, in every possible way."""
    return [_merge(runs) for runs in itertools.product(*lists)]


def zipit(lists: Sequence[Sequence[Run]]) -> Runs:
    """Combine the first runs of all lists, then the second runs, and so on.

    A list of length 1 is repeated.

    Raises:
      LaunchError: the other lists differ in length.
    """
    lengths = {len(runs) for runs in lists} - {1}
    if len(lengths) > 1:
        raise LaunchError(
            f"hyper.zipit is given lists of {' and '.join(map(str, sorted(lengths)))} runs: give "
            f"each list the same length, or length 1."
        )
    length = lengths.pop() if lengths else min(len(lists), 1)
    return [_merge([runs[i % len(runs)] for runs in lists]) for i in range(length)]


def chainit(lists: Iterable[Iterable[Run]]) -> Runs:
    """Concatenate lists of runs."""
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
