"""Looks up names in dicts, with errors that suggest the nearest name, and builds components."""

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from moe_jax.errors import UserError

T = TypeVar("T")


def suggest(name: str, known: Iterable[str]) -> str:
    """A hint: ' (did you mean X?)' with the nearest of `known`, or the sorted list of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else f" (known: {', '.join(known)})"


def dotted_keys(nested: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Yield the dotted name of every key of nested mappings, including groups (`model.moe`)."""
    for key, value in nested.items():
        yield f"{above}{key}"
        if isinstance(value, Mapping):
            yield from dotted_keys(value, f"{above}{key}.")


def suggest_key(name: str, known: Iterable[str]) -> str:
    """The hint for a dotted key that does not exist.

    Args:
      name: the key as the user typed it, such as `learning_rate` or `train.stepz`.
      known: all dotted keys, such as `optimizer.learning_rate`.

    Returns:
      ' (did you mean X?)' with the nearest keys of any group, compared by their last part and as a
      whole; if none is near, the list of keys in the group of `name`.
    """
    known = sorted(known)
    groups = {above for key in known for above in _above(key)}
    scores = {key: _likeness(name, key) * (_GROUP if key in groups else 1) for key in known}
    best = max(scores.values(), default=0.0)
    if best < _ALIKE:
        return suggest("", _siblings(name, known))
    near = sorted((key for key in scores if scores[key] > best - _CLOSE), key=lambda k: -scores[k])
    return f" (did you mean {' or '.join(map(repr, near[:_SHOWN]))}?)"


_GROUP = 0.85  # factor for groups, which take no value: an equally similar key ranks first
_ALIKE = 0.6  # minimum similarity of a suggestion
_CLOSE = 0.08  # maximum difference in similarity of further suggestions
_SHOWN = 3  # maximum number of suggestions


def _likeness(name: str, key: str) -> float:
    """Similarity from 0 to 1, mainly of the last parts: other trainers group keys differently."""
    group, dot, typed = name.replace("-", "_").rpartition(".")
    own_group, _, last = key.rpartition(".")
    words = last.split("_")
    if typed == last:
        alike = 1.0
    elif set(typed.split("_")) < set(words):  # warmup: warmup_steps
        alike = 0.9
    elif len(typed) > 1 and typed == "".join(word[:1] for word in words):  # lr: learning_rate
        alike = 0.85
    else:
        alike = _ratio(typed, last)
    whole = _ratio(typed, key.replace(".", "_"))  # checkpoint_every
    if dot:
        return max(alike * (0.8 + 0.2 * _ratio(group, own_group)), 0.9 * whole)
    return max(alike * 0.9, whole)


def _above(key: str) -> list[str]:
    """The groups that contain a dotted key."""
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _siblings(name: str, known: Sequence[str]) -> list[str]:
    """The last parts of the keys in the deepest existing group of `name`."""
    group = name.rpartition(".")[0]
    while group and group not in known:
        group = group.rpartition(".")[0]
    inside = f"{group}." if group else ""
    below = (key.removeprefix(inside) for key in known if key.startswith(inside))
    return [key for key in below if "." not in key]


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """Return `table[name]`; raises UserError naming `what` and the nearest known name."""
    if name not in table:
        raise UserError(f"{what} {name!r} is unknown{suggest(name, table)}.")
    return table[name]


def typed(hint: Any, value: Any, path: str) -> Any:
    """Return `value` if it has the plain type `hint`; an int is accepted for a float.

    Raises UserError naming the config key `path`.
    """
    origin = typing.get_origin(hint) or hint
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, origin) or (isinstance(value, bool) and origin is not bool):
        raise UserError(
            f"config.{path} is {value!r} ({type(value).__name__}): "
            f"give {'a mapping' if origin is Mapping else 'a value of type ' + origin.__name__}."
        )
    return value


def own_fields(cls: type, shared: Any) -> list[dataclasses.Field]:
    """The fields of a component's dataclass that the `shared` config does not have."""
    return [f for f in dataclasses.fields(cls) if not hasattr(shared, f.name)]


def build_component(table: Mapping[str, type[T]], name: str, shared: Any, what: str) -> T:
    """Build the component `name` from the fields it has in common with `shared` and its options.

    Args:
      table: name -> frozen dataclass.
      name: name of the component.
      shared: a config dataclass with an `options` mapping (name -> {option: value}).
      what: the config key, for error messages.

    Raises:
      UserError: the name is unknown, or an option is unknown or has the wrong type.
    """
    cls = lookup(table, name, what)
    fields = {f.name for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    hints = typing.get_type_hints(cls)
    where = f"{what.rpartition('.')[0]}.options.{name}"
    options = dict(typed(Mapping, shared.options.get(name, {}), where))
    for key, value in options.items():
        if hasattr(shared, key):  # as an option it would bypass the checks of `shared`
            raise UserError(f"{what} {name!r} shares {key!r} with the others: set it in model.moe.")
        if key not in fields:
            raise UserError(f"{what} {name!r} has no option {key!r}{suggest(key, fields)}.")
        options[key] = typed(hints[key], value, f"{where}.{key}")
    common = {key: getattr(shared, key) for key in fields - set(options) if hasattr(shared, key)}
    return cls(**common, **options)
