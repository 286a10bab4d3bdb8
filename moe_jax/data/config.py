"""The section `data` of a config: the text to train on, and how it becomes rows."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any

from moe_jax import bounds
from moe_jax.bounds import Choice, Limit, Rule, at_least, one_of
from moe_jax.decides import Data, Run, Training
from moe_jax.errors import UserError
from moe_jax.registry import lookup

SOURCES = ("stdlib", "text", "jsonl", "parquet", "hf")
POLICIES = ("stop", "skip")  # for records that hold no text
BY_SUFFIX = Choice(lambda: SOURCES, "empty to go by their suffix", lambda name: not name)
OWN_POLICY = Choice(lambda: POLICIES, "empty for data.bad_records", lambda name: not name)
WEIGHT = Limit("a number above 0", lambda weight: 0 < weight < math.inf)
SHARE = Limit("a share between 0 and 1", lambda share: 0 < share < 1)


@dataclasses.dataclass(frozen=True)
class MixtureEntry:
    """One corpus of a mixture."""

    # Kind of its files.
    source: Run[Annotated[str, BY_SUFFIX]] = ""
    files: Run[str] = ""  # paths, folders and globs, as data.files
    field: Data[str] = "text"  # the JSONL field or column that holds the text, as data.field
    weight: Data[Annotated[float, WEIGHT]] = 1.0  # relative share of the rows
    # Paths, folders and globs of the whole held-out text; data.heldout_fraction is then not used.
    heldout_files: Run[str] = ""
    # Policy for records without text.
    bad_records: Run[Annotated[str, OWN_POLICY]] = ""
    # Bad records that a build skips; -1: data.max_bad_records.
    max_bad_records: Run[Annotated[int, at_least(-1)]] = -1


# Key -> its default.
MIXTURE_KEYS = {field.name: field.default for field in dataclasses.fields(MixtureEntry)}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """One corpus, or a weighted mixture of several, and the tokenizer they share.

    Paths may change: the store's fingerprint tells whether text and tokenizer are the same.

    Raises:
      UserError: a value is out of range, or a source or key of a mixture is unknown.
    """

    # Kind of the text; stdlib: Python's standard library or, if `files` is set, by their suffix.
    source: Run[Annotated[str, one_of(SOURCES)]] = "stdlib"
    # Paths, folders and globs, comma separated (\, is a comma in a name), local or gs://, or
    # hf://OWNER/NAME:SPLIT of the Hugging Face hub.
    files: Run[str] = ""
    # The JSONL field or column that holds the text; inside an object or struct, as "meta.text".
    field: Data[str] = "text"
    # Policy for records without text (not JSON, not UTF-8, no such field, null).
    bad_records: Run[Annotated[str, one_of(POLICIES)]] = "stop"
    # Bad records per entry of the mixture that a build skips; one more stops it.
    max_bad_records: Run[Annotated[int, at_least(0)]] = 1000
    # Maximum UTF-8 bytes per document; a longer one is a bad record.  0: 1 GiB, and 32 MiB of
    # text that the tokenizer must encode at once because it cannot be cut.
    max_document_bytes: Run[Annotated[int, at_least(0)]] = 0
    # Tokenizer; bytes needs no file.
    tokenizer: Run[
        Annotated[str, Rule("bytes, or the path of a tokenizer.json or a SentencePiece .model")]
    ] = "bytes"
    # Name of the token that begins a document.  Empty: the name in tokenizer_config.json beside
    # the tokenizer, else a well-known name.
    bos: Run[str] = ""
    eos: Run[str] = ""  # as bos, for the token that ends a document
    pad: Run[str] = ""  # as bos, for padding
    begin_with_bos: Data[bool] = False  # every document begins with the bos token
    sequence_length: Data[Annotated[int, at_least(2)]] = 256  # tokens per row
    # Times that each source is read before the run ends; 0: no limit.  The learning rate still
    # follows the schedule of train.steps.
    max_epochs: Training[Annotated[int, at_least(0)]] = 0
    # Share of documents (by content hash) kept for evaluation.
    heldout_fraction: Data[Annotated[float, SHARE]] = 0.05
    # Paths, folders and globs of the whole held-out text; heldout_fraction is then not used.
    heldout_files: Run[str] = ""
    store: Run[str] = ""  # folder of the tokenised stores; empty: WORKDIR/../stores
    # Name of a corpus -> its keys, listed below; replaces source, files, field and heldout_files.
    mixture: Data[Mapping[str, Mapping[str, Any]]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        bounds.check(self, "data.")
        for name, part in self.mixture.items():
            _check_part(f"data.mixture.{name}", part)

    @property
    def entries(self) -> dict[str, MixtureEntry]:
        """The mixture with its defaults."""
        return {name: MixtureEntry(**part) for name, part in self.mixture.items()}


def _check_part(where: str, part: Any) -> None:
    """Raise UserError if an entry of a mixture has an unknown key or a value of another type."""
    if not isinstance(part, Mapping):
        raise UserError(f"{where} is {part!r}: set a mapping of {', '.join(MIXTURE_KEYS)}.")
    for key, value in part.items():
        kind = type(lookup(MIXTURE_KEYS, key, f"{where} key"))
        right = (int, float) if kind is float else kind
        if not isinstance(value, right) or isinstance(value, bool):
            raise UserError(f"{where}.{key} is {value!r}: give a value of type {kind.__name__}.")
    bounds.check(MixtureEntry(**part), f"{where}.")
