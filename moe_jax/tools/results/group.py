"""Groups runs that differ only in the seed, and decides whether groups can be ranked."""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from moe_jax.config import Config, to_flat_dict
from moe_jax.tools.results.label import MIXTURE, label, mixture
from moe_jax.tools.results.read import DONE, Result, Sample


class Spread(NamedTuple):
    """The mean and the sample standard deviation (None: there is a single value)."""

    mean: float
    deviation: float | None


def spread_of(values: Sequence[float | int]) -> Spread | None:
    """Compute mean and sample standard deviation.

    Args:
      values: any number of finite numbers.

    Returns:
      The spread; None: there is no value.
    """
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.mean(values), deviation)


@dataclasses.dataclass(frozen=True)
class Group:
    """The finished runs of one configuration; `settings` has the keys that differ by group."""

    settings: dict[str, Any]  # dotted config key -> value
    runs: tuple[Result, ...]

    def spread(self, name: str) -> Spread | None:
        """The spread of one number of `Result` over the runs that have it; None: no run has it."""
        values = [getattr(run, name) for run in self.runs]
        return spread_of([value for value in values if value is not None])

    def label(self, without: str = "") -> str:
        """A label such as `num_experts=8 router=switch`; "base" if no key differs by group."""
        return label({key: value for key, value in self.settings.items() if key != without})


def group(results: Sequence[Result]) -> list[Group]:
    """Group the finished runs by their config without the seed, in order of appearance.

    Runs of one config that were evaluated on different samples are in different groups, because
    their data has changed.
    """
    settings = _telling(results)
    members: dict[tuple[str, Sample | None], list[Result]] = {}
    for run in results:
        if run.state == DONE and run.config is not None:
            key = json.dumps(_flat(run.config), sort_keys=True), run.sample
            members.setdefault(key, []).append(run)
    return [Group(settings[runs[0].name], tuple(runs)) for runs in members.values()]


def sample_fault(groups: Sequence[Group]) -> str:
    """Say in one sentence why the held-out losses are not comparable; empty: they are."""
    difference = sample_difference([run for each in groups for run in each.runs])
    return difference and f"The held-out losses are not ranked: the runs {difference}"


def sample_difference(results: Sequence[Result]) -> str:
    """Say how the held-out samples of runs differ.

    Args:
      results: the runs; those without an evaluation are ignored.

    Returns:
      The rest of a sentence after "the runs"; empty: one sample, so their losses are comparable.
    """
    runs = [run for run in results if run.sample is not None]
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
        f"were evaluated on different samples "
        f"({named}), which differ in {', '.join(name for name in unlike if unlike[name])}; "
        f"eval.rows=0, the whole split, is one sample for every data.sequence_length."
    )


def ranks(groups: Sequence[Group]) -> list[int | None]:
    """Rank the groups by mean best held-out loss, 1 for the lowest; None: no loss.

    Equal losses share a rank.  All ranks are None if `sample_fault` is not empty.
    """
    spreads = [each.spread("best_heldout") for each in groups]
    means = [None if spread is None else spread.mean for spread in spreads]
    if sample_fault(groups):
        return [None] * len(groups)
    known = [mean for mean in means if mean is not None]
    return [None if mean is None else 1 + sum(one < mean for one in known) for mean in means]


def _size(run: Result) -> str:
    """The size of a run's sample, such as `512 rows, 65,536 tokens`, as far as it is known."""
    assert run.sample is not None
    rows = [] if run.heldout_rows is None else [f"{run.heldout_rows:,} rows"]
    tokens = [] if run.sample.tokens is None else [f"{run.sample.tokens:,} tokens"]
    return ", ".join([*rows, *tokens]) or "unknown size"


def labels(results: Sequence[Result]) -> dict[str, str]:
    """Map run name -> label of its configuration; runs without a config are left out."""
    return {name: label(settings) for name, settings in _telling(results).items()}


def _telling(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Map run name -> its values of the keys in which the runs' configs differ."""
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
    """The dotted keys that affect a run, without those that other keys make unused."""
    unused = ["wandb."]
    if config.model.dense:
        unused.append("model.moe.")
    if config.data.mixture:
        unused += ["data.source", "data.files", "data.field", "data.heldout_files"]
    flat = to_flat_dict(config)
    del flat["seed"]
    flat[MIXTURE] = mixture(config)
    return {key: value for key, value in flat.items() if not key.startswith(tuple(unused))}
