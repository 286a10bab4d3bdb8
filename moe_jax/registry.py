"""Look a name up in a plain dict, with an error that names the nearest key."""

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from moe_jax.errors import UserError

T = TypeVar("T")


def suggest(name: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the nearest of `known`, or the sorted list of all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else f" (known: {', '.join(known)})"


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """`table[name]`; raises UserError naming `what` and the nearest known name."""
    if name not in table:
        raise UserError(f"{what} {name!r} is unknown{suggest(name, table)}.")
    return table[name]


def typed(hint: Any, value: Any, path: str) -> Any:
    """`value` if it is a `hint`, a plain type; ints are welcome where floats are asked for.

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
    """Fields of a component's dataclass that the `shared` config does not hold itself."""
    return [f for f in dataclasses.fields(cls) if f.name not in shared]


def build(table: Mapping[str, type[T]], name: str, shared: Any, what: str) -> T:
    """The component `name`: fields that `shared` has come from it, the rest from its options.

    Args:
      table: name -> frozen dataclass.
      name: which entry.
      shared: a config dataclass with an `options` mapping (name -> {knob: value}).
      what: the config key, for the error.

    Raises:
      UserError: unknown name, an option the component does not have, or one of another type.
    """
    cls = lookup(table, name, what)
    fields = {f.name for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    hints = typing.get_type_hints(cls)
    options = dict(shared.options.get(name, {}))
    for key, value in options.items():
        if hasattr(shared, key):  # its checks there would be passed by
            raise UserError(f"{what} {name!r} shares {key!r} with the others: set it in model.moe.")
        if key not in fields:
            raise UserError(f"{what} {name!r} has no option {key!r}{suggest(key, fields)}.")
        path = f"{what.rpartition('.')[0]}.options.{name}.{key}"
        options[key] = typed(hints[key], value, path)
    common = {key: getattr(shared, key) for key in fields - set(options) if hasattr(shared, key)}
    return cls(**common, **options)
