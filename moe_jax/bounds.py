"""Declares the valid values of a config key together with its type.

`steps: Training[Annotated[int, at_least(1)]] = 200`: `check` refuses values out of bounds, and
docs/configuration.md and `--help` print the same bounds (keys.py).  A key may have several bounds.
"""

import dataclasses
import functools
import operator
import typing
from collections.abc import Callable, Iterable
from typing import Any

from moe_jax.errors import UserError
from moe_jax.registry import suggest


@dataclasses.dataclass(frozen=True)
class Limit:
    """A condition on the value of a key alone.

    Attributes:
      text: the valid values in words, such as `1 or more`.
      holds: True for a valid value; must be False for NaN.
      advice: words before `text` in the error message.
    """

    text: str
    holds: Callable[[Any], bool]
    advice: str = "set"

    def fault(self, key: str, value: Any) -> str:
        """The error message for a value of `key`; "" if the value is valid."""
        return "" if self.holds(value) else f"{key} is {value!r}: {self.advice} {self.text}."


@dataclasses.dataclass(frozen=True)
class Choice:
    """The names that are valid values of a key.

    Attributes:
      names: returns the names; called late, because tables may be filled after the config exists.
      other: the other valid values in words; "": there are none.
      takes: True for one of those other values.
    """

    names: Callable[[], Iterable[str]]
    other: str = ""
    takes: Callable[[str], bool] = lambda name: False

    @property
    def text(self) -> str:
        """The names in words."""
        names = f"one of {', '.join(self.names())}"
        return f"{names}, or {self.other}" if self.other else names

    def fault(self, key: str, value: str) -> str:
        """The error message for a value of `key`; "" if the value is valid."""
        names = [*self.names()]
        if value in names or self.takes(value):
            return ""
        advice = f": use one of these, or {self.other}" if self.other else ""
        return f"{key} {value!r} is unknown{suggest(value, names)}{advice}."


@dataclasses.dataclass(frozen=True)
class Rule:
    """A condition that depends on more than the key's value; the dataclass itself checks it.

    Attributes:
      text: the valid values in words, such as `between 1 and num_experts`.
    """

    text: str

    def fault(self, key: str, value: Any) -> str:
        """Always "": the dataclass checks the value."""
        return ""


Bound = Limit | Choice | Rule


def at_least(low: int | float) -> Limit:
    """The bound `low` or more."""
    return Limit(f"{low:g} or more", lambda value: value >= low)


def above(low: int | float) -> Limit:
    """The bound more than `low`."""
    return Limit(f"above {low:g}", lambda value: value > low, "set it")


def at_most(high: int | float) -> Limit:
    """The bound `high` or less."""
    return Limit(f"at most {high:g}", lambda value: value <= high)


def within(interval: str) -> Limit:
    """The bound of a finite interval in mathematical notation: `[0, 1)` contains 0 but not 1."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    over = operator.ge if interval[0] == "[" else operator.gt
    under = operator.le if interval[-1] == "]" else operator.lt
    return Limit(f"in {interval}", lambda v: over(v, low) and under(v, high), "set it")


def one_of(names: Iterable[str]) -> Choice:
    """The bound to one of `names`."""
    return Choice(lambda: names)


@functools.cache
def declared(cls: type) -> dict[str, tuple[Bound, ...]]:
    """The declared bounds of a dataclass's fields.

    Args:
      cls: a dataclass.

    Returns:
      Field name -> its bounds in order; empty for most fields.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    marks = {field.name: getattr(hints[field.name], "__metadata__", ()) for field in _fields(cls)}
    return {name: tuple(m for m in found if isinstance(m, Bound)) for name, found in marks.items()}


def check(record: Any, prefix: str) -> None:
    """Check a dataclass instance against the bounds that its fields declare.

    Args:
      record: the instance, whose `__post_init__` calls this.
      prefix: prefix of a field's name in error messages, such as `train.`.

    Raises:
      UserError: a field is out of bounds; the message names the first one.
    """
    for name, found in declared(type(record)).items():
        for bound in found:
            sentence = bound.fault(f"{prefix}{name}", getattr(record, name))
            if sentence:
                raise UserError(sentence)


def _fields(cls: type) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
