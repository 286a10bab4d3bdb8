"""Runs that differ in their seed alone, put together; and which may be ranked at all."""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from moe_jax.config import Config, to_flat_dict
from moe_jax.tools.results.label import MIXTURE, label, mixture
from moe_jax.tools.results.read import DONE, Result, Sample


class Spread(NamedTuple):
    """Mean and sample standard deviation (None for a single value)."""

    mean: float
    deviation: float | None


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one configuration at their end; `settings` are what tells groups apart."""

    settings: dict[str, Any]  # dotted config key -> value
    runs: tuple[Result, ...]

    def spread(self, name: str) -> Spread | None:
        """Of one number of `Result` over the runs that have it."""
        values = [getattr(run, name) for run in self.runs]
        values = [value for value in values if value is not None]
        if not values:
            return None
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return Spread(statistics.mean(values), deviation)

    def label(self, without: str = "") -> str:
        """Such as `num_experts=8 router=switch`; "base" where nothing tells groups apart."""
        return label({key: value for key, value in self.settings.items() if key != without})


def group(results: Sequence[Result]) -> list[Group]:
    """The runs that are done, by all of their config but the seed, in order of appearance.

    Runs of one config that were evaluated on different samples are apart: their text has changed.
    """
    settings = _telling(results)
    members: dict[tuple[str, Sample | None], list[Result]] = {}
    for run in results:
        if run.state == DONE and run.config is not None:
            key = json.dumps(_flat(run.config), sort_keys=True), run.sample
            members.setdefault(key, []).append(run)
    return [Group(settings[runs[0].name], tuple(runs)) for runs in members.values()]


def sample_fault(groups: Sequence[Group]) -> str:
    """Why the held-out losses of the groups do not compare, in one sentence; empty if they do."""
    runs = [run for each in groups for run in each.runs if run.sample is not None]
    samples = [run.sample for run in runs if run.sample is not None]
    lengths = {sample.sequence_length for sample in samples}
    unlike = {
        "size (eval.rows)": len({sample.tokens for sample in samples}) > 1,
        "text or tokenizer": len({sample.text for sample in samples}) > 1,
        "data.sequence_length": len(lengths) > 1 and not all(sample.whole for sample in samples),
    }
    if not any(unlike.values()):
        return ""
    alike: dict[tuple, list[Result]] = {}
    for run, sample in zip(runs, samples, strict=True):
        alike.setdefault((sample.tokens, sample.text, sample.sequence_length), []).append(run)
    named = "; ".join(
        f"{_size(members[0])} in {', '.join(run.name for run in members)}"
        for members in alike.values()
    )
    return (
        f"The held-out losses are not ranked: the runs were evaluated on different samples "
        f"({named}), which differ in {', '.join(name for name in unlike if unlike[name])}; "
        f"eval.rows=0, the whole split, is one sample for every data.sequence_length."
    )


def ranks(groups: Sequence[Group]) -> list[int | None]:
    """Place of each group by its mean best held-out loss, 1 the lowest; None where it has none.

    Equal losses share a place.  No group has a place where `sample_fault` is not empty.
    """
    spreads = [each.spread("best_heldout") for each in groups]
    means = [None if spread is None else spread.mean for spread in spreads]
    if sample_fault(groups):
        return [None] * len(groups)
    known = [mean for mean in means if mean is not None]
    return [None if mean is None else 1 + sum(one < mean for one in known) for mean in means]


def _size(run: Result) -> str:
    """`512 rows, 65,536 tokens`, as far as the run's folder tells it."""
    assert run.sample is not None
    rows = [] if run.heldout_rows is None else [f"{run.heldout_rows:,} rows"]
    tokens = [] if run.sample.tokens is None else [f"{run.sample.tokens:,} tokens"]
    return ", ".join([*rows, *tokens]) or "unknown size"


def labels(results: Sequence[Result]) -> dict[str, str]:
    """Run name -> label of its configuration; runs without a config are left out."""
    return {name: label(settings) for name, settings in _telling(results).items()}


def _telling(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Run name -> the keys in which the configs that have them differ."""
    flat = {run.name: _flat(run.config) for run in results if run.config is not None}
    seen: dict[str, set[str]] = {}
    for config in flat.values():
        for key, value in config.items():
            seen.setdefault(key, set()).add(json.dumps(value))
    return {
        name: {key: value for key, value in config.items() if len(seen[key]) > 1}
        for name, config in flat.items()
    }


def _flat(config: Config) -> dict[str, Any]:
    """Dotted keys of all that shapes a run; what its other keys replace is left out."""
    unused = ["wandb."]
    if config.model.dense:
        unused.append("model.moe.")
    if config.data.mixture:
        unused += ["data.source", "data.files", "data.field", "data.heldout_files"]
    flat = to_flat_dict(config)
    del flat["seed"]
    flat[MIXTURE] = mixture(config)
    return {key: value for key, value in flat.items() if not key.startswith(tuple(unused))}
