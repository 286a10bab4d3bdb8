"""Finds the control tokens of published tokenizers, and keeps text from encoding to them.

Text is data.  The tokenizers library looks for added tokens in every text before its model sees it,
and a model whose vocabulary holds a control token may match it as a word: a web page that spells
<|im_end|> would end a turn.  Here control tokens keep their ids and lose their spelling.
"""

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from etils import epath

from moe_jax.errors import UserError
from moe_jax.files import json_files
from moe_jax.registry import suggest

CONFIG_NAME = "tokenizer_config.json"  # beside published tokenizers
END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
# Names of these tokens in published tokenizers; those that end a document come before those that
# end a chat turn: GPT-2, NeoX, OLMo, Qwen, gpt-oss, Phi; Llama 3; DeepSeek (whose bars are U+FF5C);
# Llama 2, Mistral, T5; Gemma; Kimi; Cohere; Hunyuan; Seed; chat marks of Llama 3, gpt-oss, Qwen,
# Phi, Gemma; BERT.
KNOWN: dict[str, tuple[str, ...]] = {
    "bos": (
        *(
            "<|begin_of_text|>",
            "<\uff5cbegin▁of▁sentence\uff5c>",
            "<s>",
            "<bos>",
            "<|startoftext|>",
        ),
        *("[BOS]", "<BOS_TOKEN>", "<|bos|>", "<seed:bos>", "<|begin▁of▁sentence|>"),
    ),
    "eos": (
        *(
            END_OF_TEXT,
            "<|end_of_text|>",
            "<\uff5cend▁of▁sentence\uff5c>",
            "<|end▁of▁sentence|>",
            "</s>",
        ),
        *("<eos>", "[EOS]", "<EOS_TOKEN>", "<|eos|>", "<seed:eos>", "<|eod|>"),
        *("<|eot_id|>", "<|return|>", "<|im_end|>", "<|end|>", "<end_of_turn>"),
        *("<|END_OF_TURN_TOKEN|>", "[SEP]"),
    ),
    "pad": (
        *(PADDING, "<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<\uff5c▁pad▁\uff5c>"),
        *("<PAD>", "<seed:pad>"),
    ),
}
# Added tokens that are control tokens although the file does not mark them as special: a name in
# brackets, such as <think>, </tool_call> or [INST].  Blanks and masks such as |||EMAIL_ADDRESS|||
# are text.
MARK = re.compile(r"[<\[{◁]\S*\w\S*[>\]}▷]")
# Unicode never assigns U+FDD0 to a character, so texts do not hold it.
_NONCHARACTER = "\ufdd0"
_CUT = re.compile(f"({_NONCHARACTER})")


class SpecialNames(NamedTuple):
    """Names of the tokens that begin and end a document, and of padding; empty: to be found."""

    bos: str = ""  # begins every document
    eos: str = ""  # ends every document
    pad: str = ""  # fills positions without text


UNNAMED = SpecialNames()


def declared_names(folder: epath.Path) -> SpecialNames:
    """Read the names in tokenizer_config.json in `folder`; all are empty without that file.

    Raises:
      UserError: the file cannot be read or is not JSON.
    """
    path = folder / CONFIG_NAME
    if not path.exists():
        return SpecialNames()
    found = json_files.read(path)
    names = []
    for kind in SpecialNames._fields:
        value = found.get(f"{kind}_token") if isinstance(found, dict) else None
        value = value.get("content") if isinstance(value, dict) else value
        names.append(value if isinstance(value, str) else "")
    bos, eos, pad = names
    return SpecialNames(bos, eos, "" if pad == eos else pad)  # padding has its own id


def find_special(
    kind: str,
    asked: str,
    declared: str,
    vocabulary: Mapping[str, int],
    added: Collection[str],
    whole: Collection[str],
    file: epath.Path,
) -> int | None:
    """Find the id of the bos, eos or padding token.

    Args:
      kind: bos, eos or pad.
      asked: its name in the config; empty: none.
      declared: its name in tokenizer_config.json; empty: none.
      vocabulary: name -> id of every token.
      added: tokens added to the model's own; searched first.
      whole: tokens that no merge produces; searched next.
      file: of the tokenizer, for the error.

    Returns:
      The id; None: the tokenizer has no such token.

    Raises:
      UserError: `asked` is not in the vocabulary, or is a single character.
    """
    if len(asked) == 1:
        raise UserError(
            f"data.{kind} is {asked!r}, a character that texts contain: set a longer token."
        )
    if asked:
        if asked not in vocabulary:
            known = {name for names in KNOWN.values() for name in names if name in vocabulary}
            near = difflib.get_close_matches(asked, added, n=8, cutoff=0.3)
            raise UserError(
                f"data.{kind} is {asked!r}, which {file} does not have"
                f"{suggest(asked, known | set(near))}: set a name that it has, or leave it empty."
            )
        return vocabulary[asked]
    if declared in vocabulary:
        return vocabulary[declared]
    for where in (added, whole):
        for name in KNOWN[kind]:
            if name in where and name in vocabulary:
                return vocabulary[name]
    return None


class TokenizerFile:
    """The JSON of a tokenizer.json.

    Args:
      raw: content of a file that the tokenizers library has read.

    Raises:
      ValueError, TypeError, KeyError: the file differs from the format that the library writes.
    """

    def __init__(self, raw: bytes):
        self._file: dict[str, Any] = json_files.parse(raw)
        self._model: dict[str, Any] = self._file["model"]
        tokens = self._file.get("added_tokens") or []
        self.added = {token["content"]: bool(token["special"]) for token in tokens}
        merges = self._model.get("merges") or []
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in merges)
        self._merges = [(left, right) for left, right in pairs]

    @property
    def merged(self) -> set[str]:
        """The tokens that merges produce from smaller ones, as they produce words."""
        return {self._merged(left, right) for left, right in self._merges}

    def unknown(self) -> str | None:
        """The token for text that the model cannot encode."""
        vocabulary: Any = self._model["vocab"]
        place = self._model.get("unk_id")  # of Unigram, whose vocabulary is a list
        return self._model.get("unk_token") if place is None else vocabulary[place][0]

    def control(self) -> set[str]:
        """The added tokens that are control tokens."""
        return {name for name, special in self.added.items() if special or MARK.fullmatch(name)}

    def respelled(self, spelling: Mapping[str, str]) -> dict[str, Any]:
        """Copy the file with other spellings for some tokens, which keep their ids.

        Merges that produce or use such a token are removed.
        """
        vocabulary: Any = self._model["vocab"]
        if isinstance(vocabulary, dict):
            vocabulary = {spelling.get(name, name): place for name, place in vocabulary.items()}
        else:  # Unigram: pieces with scores
            vocabulary = [[spelling.get(name, name), score] for name, score in vocabulary]
        model = self._model | {"vocab": vocabulary}
        if "merges" in model:
            model["merges"] = [
                [left, right]
                for left, right in self._merges
                if not {left, right, self._merged(left, right)} & spelling.keys()
            ]
        if model.get("unk_token") in spelling:
            model["unk_token"] = spelling[model["unk_token"]]
        added = [
            token | {"content": spelling.get(token["content"], token["content"])}
            for token in self._file.get("added_tokens") or []
        ]
        # These sections add tokens that are not in the text.
        without = dict.fromkeys(("post_processor", "truncation", "padding"))
        return self._file | without | {"added_tokens": added, "model": model}

    def _merged(self, left: str, right: str) -> str:
        return left + right[len(self._model.get("continuing_subword_prefix") or "") :]


def spelling(token: int) -> str:
    """The spelling of a control token in the copy that encodes texts; see `pieces`."""
    return f"{_NONCHARACTER}{token}{_NONCHARACTER}"


def pieces(text: str) -> list[str]:
    """Cut `text` so that no piece holds a `spelling`; only texts with U+FDD0 need more than one."""
    return [piece for piece in _CUT.split(text) if piece] if _NONCHARACTER in text else [text]
