"""Declares with a config field's type what the field decides: `width: Weights[int] = 256`.

The comparison of two configs (`run/changes.py`) uses it to classify a changed key, so a new field
need not be added to any list.
"""

import dataclasses
import enum
import typing
from typing import Annotated, TypeVar

T = TypeVar("T")


class Decides(enum.Enum):
    """The part of a run that changes when the field changes."""

    WEIGHTS = "weights"
    DATA = "data"
    TRAINING = "training"
    RUN = "run"


Weights = Annotated[T, Decides.WEIGHTS]  # shapes of the parameters, the function they compute
Data = Annotated[T, Decides.DATA]  # the tokens of a step, and how they are grouped
Training = Annotated[T, Decides.TRAINING]  # how a step changes the parameters; number of steps
Run = Annotated[T, Decides.RUN]  # paths, speed, evaluation and what is kept


def declared(cls: type) -> dict[str, Decides | None]:
    """The declarations of a dataclass's fields, in field order.

    Args:
      cls: a dataclass.

    Returns:
      Field name -> its declaration; None: it has none, such as a field that holds a dataclass.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    found: dict[str, Decides | None] = {}
    for field in dataclasses.fields(cls):
        marks = getattr(hints[field.name], "__metadata__", ())
        found[field.name] = next((mark for mark in marks if isinstance(mark, Decides)), None)
    return found
