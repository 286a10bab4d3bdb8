"""What each field of a config decides, declared with its type: `width: Weights[int] = 256`.

Where two configs are compared (`run/changes.py`) this says what a changed key means, so a new
field needs no list of its own.
"""

import dataclasses
import enum
import typing
from typing import Annotated, TypeVar

T = TypeVar("T")


class Decides(enum.Enum):
    """What becomes another when the field does."""

    WEIGHTS = "weights"
    DATA = "data"
    TRAINING = "training"
    RUN = "run"


Weights = Annotated[T, Decides.WEIGHTS]  # the function that the parameters compute, their shapes
Data = Annotated[T, Decides.DATA]  # the tokens that a step sees, and how they are grouped
Training = Annotated[T, Decides.TRAINING]  # how a step changes the parameters, and how many do
Run = Annotated[T, Decides.RUN]  # where files lie, how fast it goes, what is evaluated and kept


def declared(cls: type) -> dict[str, Decides | None]:
    """What the fields of a dataclass decide, in their order.

    Args:
      cls: a dataclass.

    Returns:
      Name -> its declaration; None: it has none, as one that holds a dataclass has.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    found: dict[str, Decides | None] = {}
    for field in dataclasses.fields(cls):
        marks = getattr(hints[field.name], "__metadata__", ())
        found[field.name] = next((mark for mark in marks if isinstance(mark, Decides)), None)
    return found
