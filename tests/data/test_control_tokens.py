"""Checks that no text encodes to a control token, and which tokens are control tokens."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import LOSSLESS, MADE, MARKS, SPECIAL, TEXTS
from tokenizers import models, pre_tokenizers, trainers

from moe_jax.data.config import DataConfig
from moe_jax.data.control_tokens import SpecialNames, spelling
from moe_jax.data.tokenizers import Tokenizer, config_tokenizer, load_tokenizer
from moe_jax.errors import UserError

CONTROL = [*SPECIAL, *MARKS, "[CLS]", "[SEP]", "<|endoftext|>", "<|padding|>"]
WORDS = ["the router", "s", " ", "x", "<", "|>", "größe 日本 🙂", "\n", "</", "im_end"]
parts = st.sampled_from([*CONTROL, *WORDS, *map(spelling, range(12))])
made = pytest.mark.parametrize("name", MADE)


class Oracle:
    """Reads the same file with the library alone."""

    def __init__(self, path: Path):
        self._json = path.suffix == ".json"
        if self._json:
            self._read = tokenizers.Tokenizer.from_file(str(path))
            ids = self._read.get_vocab(with_added_tokens=True)
        else:
            self._read = sentencepiece.SentencePieceProcessor(str(path))
            ids = {self._read.id_to_piece(i): i for i in range(self._read.vocab_size())}
        self.ids = ids
        # Unknown text encodes to <unk>, so it is not a control token here.
        self.control = {ids[name] for name in CONTROL if name in ids and name != "<unk>"}

    def encode(self, text: str) -> list[int]:
        return self._read.encode(text, **{"add_special_tokens": False} if self._json else {}).ids


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> dict[str, tuple[Tokenizer, Oracle]]:
    folder = tmp_path_factory.mktemp("tokenizers")
    found = {}
    for name, make in MADE.items():
        make(folder / name)
        found[name] = load_tokenizer(str(folder / name)), Oracle(folder / name)
    return found


@made
def test_every_control_token_written_in_a_text(loaded, name):
    """Alone, between words and inside words; as a control, the library alone finds them."""
    tokenizer, oracle = loaded[name]
    found = set()
    for token in CONTROL:
        for text in (token, f"the {token} router", f"x{token}x", f"{token}{token}"):
            ids = tokenizer.encode(text).tolist()
            assert not oracle.control & set(ids), text
            if name in LOSSLESS:
                assert tokenizer.decode([*ids, tokenizer.eos_id]) == text
            if name.endswith(".json"):
                found |= oracle.control & set(oracle.encode(text))
    assert found == (oracle.control if name.endswith(".json") else set())


@made
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.lists(parts, max_size=6).map("".join), max_size=4))
def test_no_text_makes_a_control_token(loaded, name, texts):
    tokenizer, oracle = loaded[name]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert not oracle.control & set(ids.tolist()), text
        if name in LOSSLESS:
            assert tokenizer.decode(ids) == text


@made
def test_our_own_spellings_of_control_tokens_make_none(loaded, name):
    """A text may contain them."""
    tokenizer, oracle = loaded[name]
    for token in oracle.ids.values():
        ids = tokenizer.encode(f"the {spelling(token)} router")
        assert not oracle.control & set(ids.tolist())
        if name in LOSSLESS:
            assert tokenizer.decode(ids) == f"the {spelling(token)} router"


@made
@pytest.mark.parametrize("text", ["the router sends each token", "größe\n  und 日本", "", "a < b"])
def test_other_text_has_the_ids_of_the_library(loaded, name, text):
    if name.endswith(".json"):
        tokenizer, oracle = loaded[name]
        assert tokenizer.encode(text).tolist() == oracle.encode(text)


@made
def test_added_tokens_that_are_text_stay_tokens(loaded, name):
    tokenizer, oracle = loaded[name]
    for text in TEXTS:
        if name not in ("own.json", "piece.model"):
            assert oracle.ids[text] in tokenizer.encode(f"x{text}x")


def test_a_normalizer_that_makes_control_tokens_is_refused(tmp_path):
    MADE["word_level.json"](tmp_path / "bad.json")
    file = json.loads((tmp_path / "bad.json").read_text())
    file["normalizer"] = {"type": "Replace", "pattern": {"String": "x"}, "content": spelling(2)}
    (tmp_path / "bad.json").write_text(json.dumps(file))
    tokenizer = load_tokenizer(str(tmp_path / "bad.json"))
    with pytest.raises(UserError, match=r"bad\.json gives the control token '</s>' for text"):
        tokenizer.encode("a x b")


def test_a_control_token_of_one_character_is_refused(tmp_path):
    """It is refused because texts that hold the character would lose it."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator(["hello"], trainer=trainer)
    tokenizer.add_special_tokens(["h"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="has the special token 'h', a character that texts"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_chat_marks_are_bytes_for_the_byte_tokenizer():
    tokenizer = load_tokenizer("bytes")
    for token in CONTROL:
        assert tokenizer.encode(token).tolist() == list(token.encode())


# ---- which tokens begin and end documents


def write_words(path: Path, words: Sequence[str], config: dict | None = None) -> str:
    vocabulary = {word: place for place, word in enumerate(["a", "b", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "a"))
    tokenizer.add_special_tokens([word for word in words if not word.startswith("plain")])
    tokenizer.save(str(path))
    if config is not None:
        (path.parent / "tokenizer_config.json").write_text(json.dumps(config))
    return str(path)


BAR = "\uff5c"
# Family -> (its control tokens, in the order of ids; bos; eos; padding), as published.
FAMILIES = {
    "gpt2": (["<|endoftext|>"], None, "<|endoftext|>", None),
    "neox": (["<|endoftext|>", "<|padding|>"], None, "<|endoftext|>", "<|padding|>"),
    "olmo": (
        ["|||IP_ADDRESS|||", "<|padding|>", "<|endoftext|>"],
        *(None, "<|endoftext|>", "<|padding|>"),
    ),
    "llama2": (["<unk>", "<s>", "</s>"], "<s>", "</s>", None),
    "llama3": (
        ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|eot_id|>"],
        *("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"),
    ),
    "qwen": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|endoftext|>", None),
    "gemma": (["<pad>", "<eos>", "<bos>", "<end_of_turn>"], "<bos>", "<eos>", "<pad>"),
    "mistral": (["<unk>", "<s>", "</s>", "[INST]", "<pad>"], "<s>", "</s>", "<pad>"),
    "deepseek": (
        [f"<{BAR}begin▁of▁sentence{BAR}>", f"<{BAR}end▁of▁sentence{BAR}>", f"<{BAR}▁pad▁{BAR}>"],
        f"<{BAR}begin▁of▁sentence{BAR}>",
        f"<{BAR}end▁of▁sentence{BAR}>",
        f"<{BAR}▁pad▁{BAR}>",
    ),
    "phi": (["<|endoftext|>", "<|assistant|>", "<|end|>"], None, "<|endoftext|>", None),
    "gpt-oss": (
        ["<|startoftext|>", "<|endoftext|>", "<|return|>", "<|message|>"],
        *("<|startoftext|>", "<|endoftext|>", None),
    ),
    "chat only": (["<|im_start|>", "<|im_end|>"], None, "<|im_end|>", None),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_end_tokens_of_families_are_found(family, tmp_path):
    words, *expected = FAMILIES[family]
    tokenizer = load_tokenizer(write_words(tmp_path / "tokenizer.json", words))
    ids = {word: place for place, word in enumerate(["a", "b", *words])}
    size = len(ids)
    found = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    bos, eos, pad = (ids.get(word) for word in expected)
    assert found == [bos, eos, size if pad is None else pad]
    assert tokenizer.vocab_size == size + (pad is None)


def test_what_stands_beside_the_tokenizer_and_what_the_config_names(tmp_path):
    words = ["<s>", "</s>", "<pad>", "<|im_end|>", "plain"]
    path = tmp_path / "tokenizer.json"
    beside = {"bos_token": None, "eos_token": {"content": "<|im_end|>"}, "pad_token": "absent"}
    name = write_words(path, words, beside)
    first = load_tokenizer(name)
    assert (first.bos_id, first.eos_id, first.pad_id) == (2, 5, 4)
    named = config_tokenizer(DataConfig(tokenizer=name, bos="<pad>", eos="plain", pad="</s>"))
    assert (named.bos_id, named.eos_id, named.pad_id) == (4, 6, 3)
    assert 6 not in named.encode("plain") and first.encode("plain").tolist() == [6]
    write_words(path, words, beside | {"eos_token": "</s>", "pad_token": "</s>"})
    other = load_tokenizer(name)
    assert (other.eos_id, other.pad_id) == (3, 4)  # padding keeps its own id
    # With other special ids, the same file is a different tokenizer for stores and runs.
    assert len({first.identity, named.identity, other.identity}) == 3


def test_names_of_sentencepiece_tokens(tmp_path):
    path = tmp_path / "piece.model"
    MADE["piece.model"](path)
    tokenizer = load_tokenizer(str(path), SpecialNames(eos="<|im_end|>", pad="<s>"))
    oracle = Oracle(path)
    assert (tokenizer.eos_id, tokenizer.pad_id) == (oracle.ids["<|im_end|>"], oracle.ids["<s>"])
    assert tokenizer.bos_id == oracle.ids["<s>"]


def test_a_word_that_merges_make_is_no_end_token(tmp_path):
    """A tokenizer trained on HTML may have learned "</s>" as a word."""
    vocabulary = {
        word: place for place, word in enumerate(["<", "/", "s", ">", "</", "</s", "</s>"])
    }
    model = tokenizers.models.BPE(vocabulary, [("<", "/"), ("</", "s"), ("</s", ">")])
    tokenizers.Tokenizer(model).save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    assert tokenizer.encode("</s>").tolist() == [6] and tokenizer.eos_id == 7
    named = load_tokenizer(str(tmp_path / "t.json"), SpecialNames(eos="</s>"))
    assert named.eos_id == 6 and named.encode("</s>").tolist() == [5, 3]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eos": "</S>"}, r"data\.eos is '</S>', which .*did you mean '</s>'"),
        ({"bos": "no such name at all"}, r"data\.bos is .*known: .*</s>, <s>"),
        ({"pad": "a"}, r"data\.pad is 'a', a character that texts contain"),
        ({"tokenizer": "bytes", "eos": "</s>"}, r"data\.eos is '</s>', but the tokenizer 'bytes'"),
        ({"tokenizer": "bytes", "begin_with_bos": True}, r"begin_with_bos is True, but no token"),
        ({"tokenizer": "s3://b/t.json"}, r"data\.tokenizer is 's3://b/t\.json': s3:// is not supp"),
        ({"tokenizer": "hf://o/m/t.json"}, r"hf:// is not supported.*download it"),
        ({"tokenizer": "https://x.y/t.json"}, r"https:// is not supported.*download it"),
    ],
)
def test_names_that_are_refused(fields, message, tmp_path):
    name = write_words(tmp_path / "tokenizer.json", ["<s>", "</s>"])
    with pytest.raises(UserError, match=message) as error:
        config_tokenizer(DataConfig(**{"tokenizer": name} | fields))
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
