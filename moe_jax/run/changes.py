"""Compares the config of a run with the config it resumes, or whose weights it starts from."""

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from moe_jax.config import Config, option_fields
from moe_jax.data.config import DataConfig
from moe_jax.decides import Decides, declared
from moe_jax.moe.config import MoEConfig
from moe_jax.moe.dispatch import DISPATCH
from moe_jax.moe.routers import ROUTERS

_CONSEQUENCES = {
    "train.steps": "the learning-rate schedule changes with it",
    "data.max_epochs": "same batches, the run may end at a different step",
}


class Change(NamedTuple):
    """One key whose value differs."""

    key: str  # dotted, without `config.`
    old: Any  # None: the old config does not have the key
    new: Any  # None: the new config does not have the key
    decides: Decides


class _Entry(NamedTuple):
    value: Any
    decides: Decides


def changes(old: Config, new: Config) -> list[Change]:
    """List the keys whose values differ, in the order of the new config.

    A key that a config does not set has its default, and this includes the keys below
    `model.moe.options`.  Keys of a router or dispatch path that is not in use decide nothing, and
    neither does any key of `model.moe` if both models are dense.

    Args:
      old: resolved, as a run has written it.
      new: resolved.
    """
    before, after = dict(_entries(old)), dict(_entries(new))
    unused = ("model.moe.",) if old.model.dense and new.model.dense else ()
    found = []
    for key in [*after, *(key for key in before if key not in after)]:
        was, now = before.get(key), after.get(key)
        if was is None or now is None or was.value != now.value:
            decides = Decides.RUN if key.startswith(unused) else (now or before[key]).decides
            found.append(Change(key, was and was.value, now and now.value, decides))
    return found


def lines(changed: Sequence[Change], old: Config, new: Config) -> list[str]:
    """One log line per change; all mesh sizes share one line."""
    said = []
    for key, was, now, _ in changed:
        if not key.startswith("mesh."):
            more = f": {_CONSEQUENCES[key]}" if key in _CONSEQUENCES else ""
            said.append(f"{key} was {_text(was)}, is {_text(now)}{more}")
    if old.mesh != new.mesh:
        said.append(
            f"mesh was {old.mesh}, is {new.mesh}: same batches, results equal up to rounding"
        )
    return said


def of_kind(changed: Sequence[Change], kinds: Collection[Decides]) -> list[Change]:
    """The changes whose key decides one of `kinds`."""
    return [change for change in changed if change.decides in kinds]


def sentence(refused: Sequence[Change], where: str) -> str:
    """The refused changes: `config.seed is 7 but the run in this workdir has 0, config...`."""
    first, *rest = refused
    was, now = _text(first.old), _text(first.new)
    said = [f"config.{first.key} is {now} but the run {where} has {was}"]
    said += [f"config.{key} is {_text(new)} and was {_text(old)}" for key, old, new, _ in rest]
    return ", ".join(said)


def _text(value: Any) -> str:
    return "not set" if value is None else repr(value)


def _entries(config: Any, path: str = "") -> Iterator[tuple[str, _Entry]]:
    """Yield each dotted key with its value in JSON form and what the key decides."""
    kinds = declared(type(config))
    for field in dataclasses.fields(config):
        key, value = f"{path}{field.name}", getattr(config, field.name)
        kind = kinds[field.name] or Decides.TRAINING
        if dataclasses.is_dataclass(value):
            yield from _entries(value, f"{key}.")
        elif isinstance(config, DataConfig) and field.name == "mixture":
            for name, entry in config.entries.items():
                yield from _entries(entry, f"{key}.{name}.")
        elif isinstance(config, MoEConfig) and field.name == "options":
            yield from _options(config, key)
        elif isinstance(value, Mapping):
            for name, part in value.items():
                yield f"{key}.{name}", _Entry(_plain(part), kind)
        else:
            yield key, _Entry(_plain(value), kind)


def _options(moe: MoEConfig, path: str) -> Iterator[tuple[str, _Entry]]:
    """Yield the options of every router and dispatch path.

    A declared kind applies only to the router and the dispatch path in use.
    """
    for name, fields in option_fields().items():
        given = moe.options.get(name, {})
        used = {moe.router: ROUTERS, moe.dispatch: DISPATCH}.get(name)
        kinds = declared(used[name]) if used else {}
        for field in fields:
            value = given.get(field.name, field.default)
            kind = kinds.get(field.name) or Decides.TRAINING
            if value is not dataclasses.MISSING:
                yield f"{path}.{name}.{field.name}", _Entry(_plain(value), kind)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
