"""The tokenizer of a saved model: one file beside its config, whatever the run's tokenizer was."""

import json
import os

from etils import epath

from moe_jax.config import Config
from moe_jax.data.control_tokens import CONFIG_NAME, END_OF_TEXT, PADDING
from moe_jax.data.tokenizer_file import read_tokenizer_file
from moe_jax.data.tokenizers import BytesTokenizer

_JSON, _SENTENCEPIECE = "tokenizer.json", "tokenizer.model"


def tokenizer_name(folder: epath.Path, config: Config) -> str:
    """What `load_tokenizer` takes for a run or saved model.

    The file beside its config.json, if there is one; else the run's data.tokenizer.
    """
    files = (folder / name for name in (_JSON, _SENTENCEPIECE))
    return next((os.fspath(file) for file in files if file.exists()), config.data.tokenizer)


def save_tokenizer(name: str, folder: epath.Path) -> None:
    """Writes the tokenizer's file into `folder`: a copy, or byte_level_json() for "bytes".

    A tokenizer_config.json beside the file comes along.

    Args:
      name: what `load_tokenizer` took.
      folder: of the saved model.

    Raises:
      UserError: the tokenizer's file is gone.
      OSError: `folder` cannot be written.
    """
    if name == "bytes":
        (folder / _JSON).write_text(byte_level_json(), encoding="utf-8")
        return
    path = epath.Path(name).expanduser()
    raw = read_tokenizer_file(path)
    (folder / (_JSON if name.endswith(".json") else _SENTENCEPIECE)).write_bytes(raw)
    beside = path.parent / CONFIG_NAME
    if beside.exists():  # says which tokens end and begin documents
        (folder / CONFIG_NAME).write_bytes(beside.read_bytes())


def byte_level_json() -> str:
    """A Hugging Face tokenizer.json with the ids of `BytesTokenizer`, byte for byte.

    A byte-level BPE without merges.  The end-of-text and padding tokens stand in the vocabulary
    but are not "added tokens", which the library would look for in texts: a text that spells
    <|endoftext|> is its bytes, as for `BytesTokenizer`.
    """
    vocabulary = {character: byte for byte, character in _byte_characters().items()}
    vocabulary |= {END_OF_TEXT: BytesTokenizer.eos_id, PADDING: BytesTokenizer.pad_id}
    pieces = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": pieces | {"use_regex": False},
        "post_processor": None,
        "decoder": pieces | {"use_regex": False},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    return json.dumps(tokenizer, ensure_ascii=False, indent=1) + "\n"


def _byte_characters() -> dict[int, str]:
    """The character that stands for each byte in a byte-level vocabulary.

    Printable ones of Latin-1 stand for themselves, the others for characters from 256 on.

    Reference: bytes_to_unicode in encoder.py of GPT-2 (github.com/openai/gpt-2).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    return characters | {byte: chr(256 + place) for place, byte in enumerate(others)}
