"""What text to train on, and how it becomes rows."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from moe_jax.errors import UserError
from moe_jax.registry import lookup

SOURCES = ("stdlib", "text", "jsonl", "parquet")
# Keys of an entry of a mixture; the value says the type and, but for files, what holds without it.
MIXTURE_KEYS = {"source": "", "files": "", "field": "text", "weight": 1.0, "heldout_files": ""}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """One corpus, or a weighted mixture of several, and the tokenizer they share."""

    # stdlib | text | jsonl | parquet; where `files` are named, stdlib gives way to their suffix.
    source: str = "stdlib"
    files: str = ""  # glob(s), comma separated, local or gs://
    field: str = "text"  # the JSONL field or Parquet column that holds the text
    tokenizer: str = "bytes"  # bytes | path of a tokenizer.json | path of a SentencePiece .model
    # Names of the tokenizer's tokens that begin and end a document, and of padding.  Empty: what
    # tokenizer_config.json beside the tokenizer says, else well-known names.
    bos: str = ""
    eos: str = ""
    pad: str = ""
    begin_with_bos: bool = False  # every document begins with the bos token
    sequence_length: int = 256  # tokens a row
    # Times each source is read before the run ends; 0: for ever.  The learning rate follows the
    # schedule of train.steps all the same.
    max_epochs: int = 0
    heldout_fraction: float = 0.05  # share of documents (by content hash) kept for evaluation
    heldout_files: str = ""  # glob(s) of the whole held-out text; heldout_fraction is then not used
    store: str = ""  # where the tokenised store lies; empty: WORKDIR/../stores
    # name -> {files, source (by their suffix), field (text), weight (1), heldout_files (none)};
    # replaces source, files, field and heldout_files.
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
    if not isinstance(part, Mapping):
        raise UserError(f"{where} is {part!r}: give it {', '.join(MIXTURE_KEYS)}.")
    for key, value in part.items():
        kind = type(lookup(MIXTURE_KEYS, key, f"{where} key"))
        right = (int, float) if kind is float else kind
        if not isinstance(value, right) or isinstance(value, bool):
            raise UserError(f"{where}.{key} is {value!r}: give a value of type {kind.__name__}.")
    if part.get("source"):
        lookup(dict.fromkeys(SOURCES), part["source"], f"{where}.source")
    if not 0 < part.get("weight", 1.0) < math.inf:
        raise UserError(f"{where}.weight is {part['weight']}: set a number above 0.")
