"""Which values a key of a config takes, declared with its type.

`steps: Training[Annotated[int, at_least(1)]] = 200`: `check` refuses what is out of bounds, and
docs/configuration.md and `--help` print the same bounds (keys.py).  A key may have several.
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
    """Values that a key takes, by a condition on the value alone.

    Attributes:
      text: the values in words, such as `1 or more`.
      holds: True for a value that is taken; NaN must not be.
      advice: what a sentence puts before `text`.
    """

    text: str
    holds: Callable[[Any], bool]
    advice: str = "set"

    def fault(self, key: str, value: Any) -> str:
        """The sentence that refuses a value of `key`; "" for one that is taken."""
        return "" if self.holds(value) else f"{key} is {value!r}: {self.advice} {self.text}."


@dataclasses.dataclass(frozen=True)
class Choice:
    """Names that a key takes.

    Attributes:
      names: called when they are needed, so a table may stand below the config, or grow.
      other: what else the key takes, in words; "": nothing.
      takes: True for a value that is such.
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
        """The sentence that refuses a value of `key`; "" for one that is taken."""
        names = [*self.names()]
        if value in names or self.takes(value):
            return ""
        advice = f": use one of these, or {self.other}" if self.other else ""
        return f"{key} {value!r} is unknown{suggest(value, names)}{advice}."


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a key asks for beyond its value alone: its dataclass checks that itself.

    Attributes:
      text: the values in words, such as `between 1 and num_experts`.
    """

    text: str

    def fault(self, key: str, value: Any) -> str:
        """Always "": it is not known from here."""
        return ""


Bound = Limit | Choice | Rule


def at_least(low: int | float) -> Limit:
    """`low` or more."""
    return Limit(f"{low:g} or more", lambda value: value >= low)


def above(low: int | float) -> Limit:
    """More than `low`."""
    return Limit(f"above {low:g}", lambda value: value > low, "set it")


def at_most(high: int | float) -> Limit:
    """`high` or less."""
    return Limit(f"at most {high:g}", lambda value: value <= high)


def within(interval: str) -> Limit:
    """A finite interval as mathematics writes it, such as `[0, 1)`: 0 belongs to it, 1 does not."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    over = operator.ge if interval[0] == "[" else operator.gt
    under = operator.le if interval[-1] == "]" else operator.lt
    return Limit(f"in {interval}", lambda v: over(v, low) and under(v, high), "set it")


def one_of(names: Iterable[str]) -> Choice:
    """A name out of `names`."""
    return Choice(lambda: names)


@functools.cache
def declared(cls: type) -> dict[str, tuple[Bound, ...]]:
    """The declared bounds of a dataclass's fields.

    Args:
      cls: a dataclass.

    Returns:
      Name -> its bounds in their order; none for most.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    marks = {field.name: getattr(hints[field.name], "__metadata__", ()) for field in _fields(cls)}
    return {name: tuple(m for m in found if isinstance(m, Bound)) for name, found in marks.items()}


def check(record: Any, prefix: str) -> None:
    """Holds a dataclass to the bounds that its fields declare.

    Args:
      record: an instance; `__post_init__` calls this.
      prefix: what stands before a field's name in a sentence, such as `train.`.

    Raises:
      UserError: the first field that is out of bounds.
    """
    for name, found in declared(type(record)).items():
        for bound in found:
            sentence = bound.fault(f"{prefix}{name}", getattr(record, name))
            if sentence:
                raise UserError(sentence)


def _fields(cls: type) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
