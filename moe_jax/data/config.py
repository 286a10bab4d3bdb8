"""What text to train on, and how it becomes rows."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from moe_jax.decides import Data, Run, Training
from moe_jax.errors import UserError
from moe_jax.registry import lookup

SOURCES = ("stdlib", "text", "jsonl", "parquet")


@dataclasses.dataclass(frozen=True)
class MixtureEntry:
    """One corpus of a mixture."""

    # Of its files, which an empty one follows from their suffix: text | jsonl | parquet | stdlib.
    source: Run[str] = ""
    files: Run[str] = ""
    field: Data[str] = "text"
    weight: Data[float] = 1.0  # of its share in each batch
    heldout_files: Run[str] = ""


# Name -> what holds without it.
MIXTURE_KEYS = {field.name: field.default for field in dataclasses.fields(MixtureEntry)}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """One corpus, or a weighted mixture of several, and the tokenizer they share.

    Paths decide nothing: the store's fingerprint tells whether text and tokenizer are the same.

    Raises:
      UserError: a value out of range, or an unknown source or key of a mixture.
    """

    # stdlib | text | jsonl | parquet; where `files` are named, stdlib gives way to their suffix.
    source: Run[str] = "stdlib"
    files: Run[str] = ""  # glob(s), comma separated, local or gs://
    field: Data[str] = "text"  # the JSONL field or Parquet column that holds the text
    # bytes | path of a tokenizer.json | path of a SentencePiece .model.
    tokenizer: Run[str] = "bytes"
    # Name of the tokenizer's token that begins a document.  Empty: what tokenizer_config.json
    # beside the tokenizer says, else a well-known name.
    bos: Run[str] = ""
    eos: Run[str] = ""  # the same of the token that ends a document
    pad: Run[str] = ""  # the same of padding
    begin_with_bos: Data[bool] = False  # every document begins with the bos token
    sequence_length: Data[int] = 256  # tokens a row
    # Times each source is read before the run ends; 0: for ever.  The learning rate follows the
    # schedule of train.steps all the same.
    max_epochs: Training[int] = 0
    heldout_fraction: Data[float] = 0.05  # share of documents (by content hash) kept for evaluation
    # Glob(s) of the whole held-out text; heldout_fraction is then not used.
    heldout_files: Run[str] = ""
    store: Run[str] = ""  # where the tokenised store lies; empty: WORKDIR/../stores
    # name -> {files, source (by their suffix), field (text), weight (1), heldout_files (none)};
    # replaces source, files, field and heldout_files.
    mixture: Data[Mapping[str, Mapping[str, Any]]] = dataclasses.field(default_factory=dict)

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

    @property
    def entries(self) -> dict[str, MixtureEntry]:
        """The mixture with its defaults."""
        return {name: MixtureEntry(**part) for name, part in self.mixture.items()}


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
