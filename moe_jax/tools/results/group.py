"""Runs that differ in their seed alone, put together."""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from moe_jax.config import Config, to_flat_dict
from moe_jax.tools.results.read import DONE, Result


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
        return _label({key: value for key, value in self.settings.items() if key != without})


def group(results: Sequence[Result]) -> list[Group]:
    """The runs that are done, by all of their config but the seed, in order of appearance."""
    settings = _telling(results)
    members: dict[str, list[Result]] = {}
    for run in results:
        if run.state == DONE and run.config is not None:
            members.setdefault(json.dumps(_flat(run.config), sort_keys=True), []).append(run)
    return [Group(settings[runs[0].name], tuple(runs)) for runs in members.values()]


def labels(results: Sequence[Result]) -> dict[str, str]:
    """Run name -> label of its configuration; runs without a config are left out."""
    return {name: _label(settings) for name, settings in _telling(results).items()}


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
    """Dotted keys of all that shapes a run; a dense model ignores what is said about experts."""
    flat = to_flat_dict(config)
    del flat["seed"]
    if not config.model.dense:
        return flat
    return {key: value for key, value in flat.items() if not key.startswith("model.moe.")}


def _label(settings: dict[str, Any]) -> str:
    words = []
    for key, value in settings.items():
        name = key.rpartition(".")[2]
        if value is True:
            words.append(name)
        elif value is not False or len(settings) == 1:
            words.append(f"{name}={value}")
    return " ".join(words) or "base"
