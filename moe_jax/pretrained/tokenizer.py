"""Finds and saves a model's tokenizer: a saved model has one tokenizer file beside its config."""

import json
import os

from etils import epath

from moe_jax.config import Config
from moe_jax.data.control_tokens import CONFIG_NAME, END_OF_TEXT, PADDING
from moe_jax.data.tokenizer_file import read_tokenizer_file
from moe_jax.data.tokenizers import BytesTokenizer

_JSON, _SENTENCEPIECE = "tokenizer.json", "tokenizer.model"


def tokenizer_name(folder: epath.Path, config: Config) -> str:
    """The name that `load_tokenizer` takes for a run or saved model.

    This is the file beside config.json, if there is one, else the run's data.tokenizer.
    """
    files = (folder / name for name in (_JSON, _SENTENCEPIECE))
    return next((os.fspath(file) for file in files if file.exists()), config.data.tokenizer)


def save_tokenizer(name: str, folder: epath.Path) -> None:
    """Write the tokenizer's file into `folder`: a copy, or byte_level_json() for "bytes".

    A tokenizer_config.json beside the original file is copied too.

    Args:
      name: the name that `load_tokenizer` took.
      folder: folder of the saved model.

    Raises:
      UserError: the tokenizer's file is missing.
      OSError: `folder` cannot be written.
    """
    if name == "bytes":
        (folder / _JSON).write_text(byte_level_json(), encoding="utf-8")
        return
    path = epath.Path(name).expanduser()
    raw = read_tokenizer_file(path)
    (folder / (_JSON if name.endswith(".json") else _SENTENCEPIECE)).write_bytes(raw)
    beside = path.parent / CONFIG_NAME
    if beside.exists():  # names the tokens that begin and end documents
        (folder / CONFIG_NAME).write_bytes(beside.read_bytes())


def byte_level_json() -> str:
    """A Hugging Face tokenizer.json with the same ids as `BytesTokenizer`.

    It is a byte-level BPE without merges.  The end-of-text and padding tokens are in the vocabulary
    but are not "added tokens", which the library would match in text: text that contains
    <|endoftext|> is encoded as its bytes, as by `BytesTokenizer`.
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
    """The character that represents each byte in a byte-level vocabulary.

    Printable Latin-1 bytes are represented by themselves, the others by characters from 256 on.

    Reference: bytes_to_unicode in encoder.py of GPT-2 (github.com/openai/gpt-2).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    return characters | {byte: chr(256 + place) for place, byte in enumerate(others)}
