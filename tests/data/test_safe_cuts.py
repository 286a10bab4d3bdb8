"""Checks that texts encoded in pieces have the tokens of the whole, for each kind of tokenizer."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import MADE
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from moe_jax.data import long_documents
from moe_jax.data.long_documents import encoding_pieces
from moe_jax.data.safe_cuts import PATTERNS, safe_cut
from moe_jax.data.tokenizers import load_tokenizer

WORDS = ["expert", "The", "don't", "I'LL", "x", "café", "größe", "日本語", "한국어", "мир"]
TWO_MEGABYTES = 2_000_000


def split(pattern: str, behavior: str = "isolated", invert: bool = False) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior, invert)


def byte_level(prefix: bool = False, regex: bool = True) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)


BYTES_ONLY = byte_level(regex=False)
# Name -> (pre-tokenizer, texts may be cut at blanks, texts may be cut at line ends).
KINDS: dict[str, tuple[Any, bool, bool]] = {
    "gpt2": (byte_level(), True, True),
    "prefix": (byte_level(True), True, False),
    "cl100k": (pre_tokenizers.Sequence([split(PATTERNS[1]), BYTES_ONLY]), True, True),
    "qwen": (pre_tokenizers.Sequence([split(PATTERNS[2]), BYTES_ONLY]), True, True),
    "o200k": (
        pre_tokenizers.Sequence([split(PATTERNS[3], "removed", True), BYTES_ONLY]),
        True,
        True,
    ),
    "numbers": (
        pre_tokenizers.Sequence([split(r"\p{N}{1,3}"), split(PATTERNS[0]), BYTES_ONLY]),
        True,
        True,
    ),
    "digits": (pre_tokenizers.Sequence([pre_tokenizers.Digits(), byte_level()]), True, True),
    "punctuation": (
        pre_tokenizers.Sequence([pre_tokenizers.Punctuation("merged_with_next"), byte_level()]),
        True,
        True,
    ),
    "whitespace": (pre_tokenizers.Whitespace(), True, True),
    "whitespace_split": (pre_tokenizers.WhitespaceSplit(), True, True),
    "bert": (pre_tokenizers.BertPreTokenizer(), True, True),
    "metaspace": (pre_tokenizers.Metaspace(prepend_scheme="always"), True, False),
    "metaspace_first": (pre_tokenizers.Metaspace(prepend_scheme="first"), True, False),
    "words_metaspace": (
        pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="first")]
        ),
        True,
        False,
    ),
    "none": (None, False, False),
    "bytes_only": (BYTES_ONLY, False, False),
    "unknown": (split(r"\w+ \w+"), False, False),
    "punctuation_only": (pre_tokenizers.Punctuation(), False, False),
    "metaspace_whole": (pre_tokenizers.Metaspace(split=False), False, False),
}
NORMALIZERS: dict[str, Any] = {
    "": None,
    "nfc": normalizers.NFC(),
    "nfkd": normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents()]),
    "lower": normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
}


def made(path: Path, pre: Any, normalizer: Any = None) -> Path:
    """Write a BPE tokenizer whose merges join everything that is adjacent in a small text."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>"], initial_alphabet=letters, show_progress=False
    )
    sample = [prose(random.Random(i), 3000) for i in range(3)] + ["a  b\n\n\tc  \n d 。\nx " * 50]
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.add_tokens([AddedToken("  ", normalized=False), "|||MAIL|||", AddedToken("\t")])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True), "</s>"])
    tokenizer.save(str(path))
    return path


def prose(rng: random.Random, size: int) -> str:
    parts: list[str] = []
    while size > 0:
        parts.append(rng.choice(WORDS) + rng.choice([" ", " ", " ", ", ", ".\n", "。\n", "\n\n"]))
        size -= len(parts[-1])
    return "".join(parts)


def of(pieces: list[str], rng: random.Random, size: int) -> str:
    return "".join(rng.choices(pieces, k=size // max(1, len("".join(pieces)) // len(pieces))))


CODE = ["def f(x):\n", "    return x\n", "\t\tif a < b:\n", "\r\n", "# it's\n", "/*", "1234", "  "]
MARKS = ["<mask>", " <mask> ", "</s>", "\ufdd0", "|||MAIL|||", "  ", "one two", "\n", " a b "]
EMOJI = [
    "e\u0301",
    "\u0308",
    "👩‍👩‍👧",
    "🙂",
    " ",
    "a",
    "\n",
    "\u1100\u1161",
    "ﬁ",
    "\u037a",
    " \u0301",
]
TEXTS = {
    "prose": prose,
    "code": lambda rng, size: of(CODE, rng, size),
    "blanks": lambda rng, size: of([" " * 999, "a b", "\n" * 99, "\u00a0", "\u3000"], rng, size),
    "no blanks": lambda rng, size: of(["abc", "日本", "12", "_"], rng, size),
    "han": lambda rng, size: of(["日本語", "中文。", "\n", "、", "한국"], rng, size),
    "emoji": lambda rng, size: of(EMOJI, rng, size),
    "marks": lambda rng, size: of(MARKS, rng, size),
}


def same(tokenizer: Any, text: str) -> int:
    """Compare the tokens of a text's pieces with those of the whole; returns their number."""
    pieces = list(encoding_pieces(text, tokenizer.cut))
    assert "".join(pieces) == text
    whole = tokenizer.encode(text)
    np.testing.assert_array_equal(np.concatenate(tokenizer.encode_batch(pieces)), whole)
    return len(pieces)


@pytest.mark.parametrize("kind", KINDS)
def test_where_a_kind_lets_texts_be_cut(tmp_path, kind):
    pre, blank, line = KINDS[kind]
    tokenizer = load_tokenizer(str(made(tmp_path / "t.json", pre)))
    for left, right, safe in (("one", " two", blank), ("one.\n", "two", line)):
        text = left + right
        assert tokenizer.cut(text, 1) == (len(left) if safe else len(text))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict[str, Any]:
    """Load tokenizers of every kind, with the normalizers in turn, and those of MADE."""
    folder, found = tmp_path_factory.mktemp("tokenizers"), {}
    for kind, (pre, blank, _) in KINDS.items():
        name = list(NORMALIZERS)[len(found) % len(NORMALIZERS)]
        path = made(folder / f"{kind}.json", pre, NORMALIZERS[name] if blank else None)
        found[path.name] = load_tokenizer(str(path))
    for name, make in MADE.items():
        make(folder / name)
        found[name] = load_tokenizer(str(folder / name))
    return found


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_tiny_pieces_have_the_tokens_of_the_whole(small, data):
    parts = [*WORDS, *CODE, *MARKS, *EMOJI, " ", " ", "\n", "a b", "one\ntwo", ".", "。\n日"]
    text = "".join(data.draw(st.lists(st.sampled_from(parts) | st.text(max_size=3), max_size=40)))
    size = data.draw(st.integers(1, 9))
    tokenizer = small[data.draw(st.sampled_from(sorted(small)))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_documents, "PIECE_CHARACTERS", size)
        if text:
            same(tokenizer, text)


@pytest.mark.parametrize("text", TEXTS)
def test_random_texts_in_small_pieces(small, text, monkeypatch):
    monkeypatch.setattr(long_documents, "PIECE_CHARACTERS", 50)
    for number, tokenizer in enumerate(small.values()):
        same(tokenizer, TEXTS[text](random.Random(number), 2000))


@pytest.mark.full
@pytest.mark.parametrize("text", TEXTS)
def test_two_megabytes(small, text, monkeypatch):
    monkeypatch.setattr(long_documents, "PIECE_CHARACTERS", 50_000)
    whole = TEXTS[text](random.Random(0), TWO_MEGABYTES)
    for name in ("own", "gpt2", "cl100k", "o200k", "metaspace", "bert"):
        pieces = same(small[f"{name}.json"], whole)
        assert pieces > 20 or text not in ("prose", "code")


@pytest.mark.parametrize(
    ("added", "blank", "line"),
    [
        ({"content": "one two"}, False, True),
        ({"content": "one", "rstrip": True}, False, True),
        ({"content": " two", "single_word": True}, False, True),
        ({"content": "two", "lstrip": True}, True, False),
        ({"content": "\nt"}, True, False),
        ({"content": "<mask>", "lstrip": True, "rstrip": True}, True, True),
    ],
)
def test_added_tokens_that_look_across_a_cut(tmp_path, added, blank, line):
    """As a control, the encoding itself shows which of them have other tokens in pieces."""
    path = made(tmp_path / "t.json", byte_level())
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.add_tokens([AddedToken(**added, normalized=False)])
    tokenizer.save(str(path))
    pattern = safe_cut(json.loads(path.read_text()), lambda text: text)
    assert pattern is not None
    for left, right, safe in (("one", " two", blank), ("one.\n", "two", line)):
        assert bool(pattern.search(left + right)) == safe
        parts = [tokenizer.encode(part).ids for part in (left, right)]
        assert ([*parts[0], *parts[1]] == tokenizer.encode(left + right).ids) == safe


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.Prepend("a"),
        normalizers.Strip(),
        normalizers.Replace(" ", "_"),
        normalizers.Sequence([normalizers.NFC(), normalizers.Replace("e t", "x")]),
    ],
)
def test_normalizers_that_look_across_a_cut(tmp_path, normalizer):
    path = made(tmp_path / "t.json", byte_level(), normalizer)
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.cut("one two\nthree four", 1) == len("one two\nthree four")
