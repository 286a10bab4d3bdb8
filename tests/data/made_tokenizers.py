"""Writes small tokenizers of every kind, with the control tokens that published ones have."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from moe_jax.data.tokenizers import train_bpe

SAMPLE = [
    "the router sends each token to an expert\n" * 20,
    "größe und 日本\n" * 20,
    "if a < b and [x] | {y}: </s> is <s> or <|im_end|>\n" * 20,
]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|reserved_0|>"]
MARKS = ["<think>", "</think>", "[INST]", "<\uff5cUser\uff5c>"]  # not special in their files
TEXTS = ["  ", "|||EMAIL_ADDRESS|||"]  # added tokens that are text


def _add(tokenizer: tokenizers.Tokenizer, special: list[str] = SPECIAL) -> None:
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    tokenizer.add_tokens([AddedToken(name) for name in (*MARKS, *TEXTS)])


def _bpe(path: Path, ignore_merges: bool) -> None:
    """Like GPT-2 and Llama 3: byte-level; some control tokens are also words of the vocabulary."""
    train_bpe(iter(SAMPLE), 300, path)
    file = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = file["model"]["vocab"]
    for name in ("</s>", "<|im_end|>", "<think>"):
        vocabulary.setdefault(name, len(vocabulary))
    file["model"]["ignore_merges"] = ignore_merges
    # Without a pattern, marks are not cut and are found as whole words, as in some tokenizers.
    file["pre_tokenizer"]["use_regex"] = not ignore_merges
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(file))
    _add(tokenizer)
    tokenizer.save(str(path))


def bpe(path: Path) -> None:
    _bpe(path, ignore_merges=False)


def bpe_ignore_merges(path: Path) -> None:
    _bpe(path, ignore_merges=True)


def bpe_sentencepiece(path: Path) -> None:
    """Like Llama 2 and Gemma: blanks are U+2581, with byte fallback; merges produce "</s>"."""
    merges = [("<", "/"), ("</", "s"), ("</s", ">"), ("t", "h"), ("th", "e"), ("\u2581", "the")]
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [*"</s>the\u2581 routndaxp", *(left + right for left, right in merges)]
    vocabulary = {name: place for place, name in enumerate(dict.fromkeys(names))}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    _add(tokenizer)
    tokenizer.save(str(path))


def unigram(path: Path) -> None:
    """Like T5 and XLM-R: control tokens are pieces of the model."""
    letters = sorted(set("".join(SAMPLE)) | set("<>/|[]_=0123456789INSTUser\uff5cmkdh"))
    pieces = [(name, 0.0) for name in (*SPECIAL, *MARKS)]
    pieces += [("\u2581", -2.0), *((letter, -4.0) for letter in letters if letter != " ")]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    _add(tokenizer)
    tokenizer.save(str(path))


def word_level(path: Path) -> None:
    """The control tokens are all words."""
    words = [*SPECIAL, *MARKS, "the", "router", "sends", "a", "token"]
    vocabulary = {word: place for place, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    _add(tokenizer)
    tokenizer.save(str(path))


def word_piece(path: Path) -> None:
    """Like BERT, without splitting at punctuation."""
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", *SPECIAL, *MARKS, "the", "router", "##s"]
    letters = sorted({*"[]<>|/", *"".join(words)})
    words += [*letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {word: place for place, word in enumerate(dict.fromkeys(words))}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    _add(tokenizer, ["[CLS]", "[SEP]", "[PAD]", *SPECIAL])
    tokenizer.save(str(path))


def own(path: Path) -> None:
    """The tokenizer that `moe_jax data train-bpe` writes."""
    train_bpe(iter(SAMPLE), 300, path)


def piece(path: Path) -> None:
    """A SentencePiece model, with marks as user-defined and as control symbols."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(SAMPLE).splitlines()),
        model_writer=model,
        vocab_size=360,
        pad_id=3,
        byte_fallback=True,
        hard_vocab_limit=False,
        control_symbols=["<|im_start|>"],
        user_defined_symbols=["<|im_end|>", *MARKS, *TEXTS],
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


# File name -> the function that writes it.
MADE: dict[str, Callable[[Path], None]] = {
    "bpe.json": bpe,
    "bpe_ignore_merges.json": bpe_ignore_merges,
    "bpe_sentencepiece.json": bpe_sentencepiece,
    "unigram.json": unigram,
    "word_level.json": word_level,
    "word_piece.json": word_piece,
    "own.json": own,
    "piece.model": piece,
}
# Byte-level or with byte fallback, so every text round-trips.
LOSSLESS = ("bpe.json", "bpe_ignore_merges.json", "bpe_sentencepiece.json", "own.json")
