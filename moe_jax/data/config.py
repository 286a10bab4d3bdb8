"""What text to train on, and how it becomes rows."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from moe_jax.errors import UserError
from moe_jax.registry import lookup

SOURCES = ("stdlib", "text", "jsonl", "parquet")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """One corpus, or a weighted mixture of several, and the tokenizer they share."""

    source: str = "stdlib"  # stdlib | text | jsonl | parquet
    files: str = ""  # glob(s), comma separated, local or gs://
    field: str = "text"  # the JSONL field or Parquet column that holds the text
    tokenizer: str = "bytes"  # bytes | path of a tokenizer.json | path of a SentencePiece .model
    sequence_length: int = 256  # tokens a row
    # Times each source is read before the run ends; 0: for ever.  The learning rate follows the
    # schedule of train.steps all the same.
    max_epochs: int = 0
    heldout_fraction: float = 0.05  # share of documents (by content hash) kept for evaluation
    store: str = ""  # where the tokenised store lies; empty: WORKDIR/../stores
    # name -> {source (text), files, field (text), weight (1)}; replaces source, files and field.
    mixture: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.sequence_length < 2:
            raise UserError(f"data.sequence_length is {self.sequence_length}: set 2 or more.")
        if self.max_epochs < 0:
            raise UserError(f"data.max_epochs is {self.max_epochs}: set 0 or more.")
        if not 0 < self.heldout_fraction < 1:
            raise UserError(
                f"data.heldout_fraction is {self.heldout_fraction}: set a share between 0 and 1."
            )
        lookup(dict.fromkeys(SOURCES), self.source, "data.source")
        for name, part in self.mixture.items():
            _check_part(f"data.mixture.{name}", part)


def _check_part(where: str, part: Any) -> None:
    """Raises UserError for an entry of a mixture with an unknown key or a value out of place."""
    known = {"source": str, "files": str, "field": str, "weight": float}
    if not isinstance(part, Mapping):
        raise UserError(f"{where} is {part!r}: give it {', '.join(known)}.")
    for key, value in part.items():
        kind = lookup(known, key, f"{where} key")
        if not isinstance(value, (int, float) if kind is float else kind):
            raise UserError(f"{where}.{key} is {value!r}: give a value of type {kind.__name__}.")
    lookup(dict.fromkeys(SOURCES), part.get("source", "text"), f"{where}.source")
    if not 0 < part.get("weight", 1.0) < math.inf:
        raise UserError(f"{where}.weight is {part['weight']}: set a number above 0.")
