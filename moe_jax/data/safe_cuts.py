"""Finds positions where cutting a text does not change its tokens.

The tokenizers library splits a text at added tokens, normalizes what lies between, splits that by
the pre-tokenizer and gives the model one part at a time.  A position is safe if the pre-tokenizer
ends a part there, regardless of the rest of the text, and if no added token and no normalizer acts
across it.  Two kinds of positions are used:

* between a letter and one blank before a letter, "one| two";
* after a line end between a visible character and a letter, "one.\\n|two".

Both are decided from what the file declares.  A tokenizer with a part that is not listed here gets
every text in one piece.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_WORDS = "|".join(
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_CASED[0]}]{upper}[{_CASED[1]}]{lower}{_CONTRACTIONS}?"
    for upper, lower in (("*", "+"), ("+", "*"))
)


def _tiktoken(numbers: str) -> str:
    """The pattern of cl100k; its copies differ in the number of digits that they match at once."""
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANKS}"
    )


# Patterns whose matches hold neither a letter before a blank nor a line end before a letter, and do
# not depend on the text before them.
PATTERNS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    _tiktoken(r"\p{N}{1,3}"),  # cl100k, Llama 3
    _tiktoken(r"\p{N}"),  # Qwen 2 and 3
    rf"{_WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}",  # o200k, gpt-oss
)
# Patterns that match no letter and no blank: they may come before one of the patterns above.
_NUMBERS = (r"\p{N}", r"\p{N}{1,3}", r"\d", r"[0-9]", r"[0-9][0-9][0-9]")

# Letters that stay letters in every normalizer below.
_LETTERS = (
    "A-Za-z\u03b1-\u03c9\u0410-\u044f\u05d0-\u05ea\u0621-\u064a\u0905-\u0939\u0e01-\u0e30"
    "\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\uac00-\ud7a3"
)  # Latin, Greek, Cyrillic, Hebrew, Arabic, Devanagari, Thai, kana, Han, Hangul
_BLANK = r"[A-Za-z](?= [A-Za-z])"
_LINE = rf"[!-~\u3001\u3002{_LETTERS}]\n(?=[{_LETTERS}])"
_LETTER_BLANK = re.compile("[A-Za-z] ")
_BEGINS_WITH_LETTER = re.compile(r"[^\W\d_]")


class _Kinds(NamedTuple):
    """The kinds of positions that are safe."""

    blank: bool = False
    line: bool = False

    def both(self, other: "_Kinds") -> "_Kinds":
        """The kinds that are safe in both."""
        return _Kinds(self.blank and other.blank, self.line and other.line)


_NONE, _ALL, _BLANK_ONLY = _Kinds(), _Kinds(True, True), _Kinds(True, False)


def safe_cut(file: Mapping[str, Any], normalize: Callable[[str], str]) -> re.Pattern[str] | None:
    """Find positions where texts may be cut.

    Args:
      file: the JSON of a tokenizer.json.
      normalize: applies its normalizer to a text.

    Returns:
      A pattern whose matches end at safe positions; None: none is known.
    """
    safe = _pre_tokenizer(file.get("pre_tokenizer")).both(_normalizer(file.get("normalizer")))
    for token in file.get("added_tokens") or []:
        for content in (token["content"], normalize(token["content"])):
            safe = safe.both(_added(content, token))
    if file["model"].get("dropout"):
        return None  # the encoding differs from call to call
    kinds = [kind for kind, is_safe in ((_BLANK, safe.blank), (_LINE, safe.line)) if is_safe]
    return re.compile("|".join(kinds)) if kinds else None


def _added(content: str, token: Mapping[str, Any]) -> _Kinds:
    """The kinds of cuts across which the library cannot find an added token in a text."""
    strips = {side: bool(token.get(side)) for side in ("lstrip", "rstrip", "single_word")}
    blank = not (
        _LETTER_BLANK.search(content)
        or (strips["rstrip"] and content[-1:].isalpha())
        or (strips["single_word"] and content.startswith(" "))
    )
    line = "\n" not in content and not (
        strips["lstrip"] and _BEGINS_WITH_LETTER.match(content) is not None
    )
    return _Kinds(blank, line)


def _normalizer(part: Mapping[str, Any] | None) -> _Kinds:
    """The kinds of cuts that a normalizer keeps, and whose two sides it treats separately."""
    if part is None:
        return _ALL
    kind = part["type"]
    if kind == "Sequence":
        safe = _ALL
        for one in part["normalizers"]:
            safe = safe.both(_normalizer(one))
        return safe
    if kind in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents"):
        return _ALL
    if kind in ("BertNormalizer", "Nmt"):
        return _BLANK_ONLY  # they turn line ends into blanks
    if kind == "Replace" and part["pattern"] == {"Regex": " {2,}"}:
        return _ALL
    return _NONE  # Prepend, Strip, Precompiled, Replace: they may move or remove blanks


def _pre_tokenizer(part: Mapping[str, Any] | None) -> _Kinds:
    """The kinds of positions where a pre-tokenizer always ends a part."""
    if part is None:
        return _NONE  # the model is given the whole text
    kind = part["type"]
    if kind == "Sequence":
        return _sequence(part["pretokenizers"])
    if kind == "ByteLevel" and part.get("use_regex", True):
        # It puts a blank before a piece that does not begin with one.
        return _BLANK_ONLY if part["add_prefix_space"] else _ALL
    if kind in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer"):
        return _ALL
    if kind == "Metaspace" and part.get("split", True):
        return _BLANK_ONLY
    if kind == "Split" and part["pattern"].get("Regex") in PATTERNS:
        how = part["behavior"], bool(part["invert"])
        return _ALL if how in (("Isolated", False), ("Removed", True)) else _NONE
    return _NONE


def _sequence(parts: list[Mapping[str, Any]]) -> _Kinds:
    """As `_pre_tokenizer`: after one has ended a part, the next ones see the sides separately."""
    for number, part in enumerate(parts):
        found = _pre_tokenizer(part)
        if found != _NONE:
            # This one or a later one may put a blank before a piece that begins a line.
            adds = any(_adds_blank(one) for one in parts[number:])
            return _BLANK_ONLY if adds else found
        if not _keeps_apart(part):
            return _NONE
    return _NONE


def _adds_blank(part: Mapping[str, Any]) -> bool:
    return part["type"] == "Metaspace" or bool(part.get("add_prefix_space"))


def _keeps_apart(part: Mapping[str, Any]) -> bool:
    """True if a pre-tokenizer splits the two sides of a cut exactly as it splits the whole text.

    It need not end a part at the cut.
    """
    if part["type"] in ("Digits", "Punctuation"):
        return True
    numbers = part["type"] == "Split" and part["pattern"].get("Regex") in _NUMBERS
    return numbers and part["behavior"] == "Isolated" and not part["invert"]
