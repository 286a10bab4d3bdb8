"""Checks untrusted JSON values and builds typed records from them.

Each check returns the value it was given, or raises ValueError with the reason in a few words.
"""

import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from moe_jax.files import json_files

T = TypeVar("T")
LARGEST = 2**53  # float64 holds every smaller integer exactly


class LineError(ValueError):
    """A line that is not a valid record; `number` counts lines from 1."""

    def __init__(self, number: int, reason: str):
        super().__init__(reason)
        self.number = number


def parse_lines(lines: Iterable[str | bytes], record_of: Callable[[Any], T]) -> Iterator[T]:
    """Yield the record of each line.

    Args:
      lines: the lines of a JSON-lines file, in order.
      record_of: builds a record from a line's JSON value, or raises ValueError.

    Raises:
      LineError: a line is not JSON, or `record_of` raises for its value.
    """
    for number, line in enumerate(lines, 1):
        try:
            yield record_of(json_files.parse(line))
        except ValueError as error:
            raise LineError(number, str(error)) from None


def parse_line(line: str | bytes, record_of: Callable[[Any], T]) -> T | None:
    """The record of one line, as in `parse_lines`; None if the line is not a valid record."""
    try:
        return record_of(json_files.parse(line))
    except ValueError:
        return None


def typed(cls: type[T], value: Any) -> T:
    """Build `cls` from a JSON object that has exactly its fields, each of the annotated type.

    Args:
      cls: a dataclass or NamedTuple of int (a `count`), str, bool, dict and fixed-length tuples.
      value: any JSON value.

    Raises:
      ValueError: `value` is not such an object.
    """
    hints = typing.get_type_hints(cls)
    if mapping(value).keys() != hints.keys():
        raise ValueError(f"its fields are not {', '.join(hints)}")
    return cls(**{name: _of_type(hint, value[name], name) for name, hint in hints.items()})


def _of_type(hint: Any, value: Any, name: str) -> Any:
    origin, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is int:
        return count(value)
    if origin is tuple and isinstance(value, list) and len(value) == len(parts):
        return tuple(_of_type(part, one, name) for part, one in zip(parts, value, strict=True))
    if type(value) is not origin:
        raise ValueError(f"{name} has the wrong type")
    return value


def mapping(value: Any) -> dict[str, Any]:
    """Check that `value` is a JSON object."""
    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    return value


def text(value: Any) -> str:
    """Check that `value` is a string."""
    if not isinstance(value, str):
        raise ValueError("it is not a string")
    return value


def items(value: Any) -> list[Any]:
    """Check that `value` is a list."""
    if not isinstance(value, list):
        raise ValueError("it is not a list")
    return value


def names(value: Any) -> list[str]:
    """Check that `value` is a list of strings."""
    return [text(name) for name in items(value)]


def count(value: Any, limit: int = LARGEST) -> int:
    """Check that `value` is an integer from 0 to below `limit`; booleans are refused."""
    if type(value) is not int or not 0 <= value < limit:
        raise ValueError("it is not a count (an integer, at least 0)")
    return value


def number(value: Any, limit: float) -> float:
    """Check that `value` is a number from 0 to `limit`; booleans are refused."""
    if type(value) not in (int, float) or not 0 <= value <= limit:
        raise ValueError("it is not a number in range")
    return float(value)
