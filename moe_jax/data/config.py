"""What text to train on, and how it becomes rows."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_jax.errors import UserError

SOURCES = ("stdlib", "text", "jsonl", "parquet")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """One corpus, or a weighted mixture of several, and the tokenizer they share."""

    source: str = "stdlib"  # stdlib | text | jsonl | parquet
    files: str = ""  # glob(s), comma separated, local or gs://
    field: str = "text"  # the JSONL field or Parquet column that holds the text
    tokenizer: str = "bytes"  # bytes | path of a tokenizer.json | path of a SentencePiece .model
    sequence_length: int = 256  # tokens a row
    heldout_fraction: float = 0.05  # share of documents (by content hash) kept for evaluation
    store: str = ""  # where the tokenised store lies; empty: WORKDIR/../stores
    # name -> {source, files, field, weight}; when not empty, replaces source, files and field.
    mixture: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.sequence_length < 2:
            raise UserError(f"data.sequence_length is {self.sequence_length}: set 2 or more.")
        if not 0 < self.heldout_fraction < 1:
            raise UserError(
                f"data.heldout_fraction is {self.heldout_fraction}: set a share between 0 and 1."
            )
        for name, part in self.mixture.items():
            weight = part.get("weight", 1.0)
            if not weight > 0:
                raise UserError(f"data.mixture.{name}.weight is {weight}: set it above 0.")
