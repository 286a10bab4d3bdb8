"""Checks tokenizers: round trips, special ids, refused files."""

import errno
import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers

from moe_jax.data.tokenizers import load_tokenizer, train_bpe
from moe_jax.errors import UserError

TEXTS = ["def f(x):\n    return x\n", "größe 日本 🙂", "", "\x00\x7f\r\n"]
SAMPLE = ["the router sends each token to an expert\n" * 20, "größe und 日本\n" * 20]


@pytest.fixture
def bpe(tmp_path: Path) -> str:
    train_bpe(iter(SAMPLE), 280, tmp_path / "tokenizer.json")
    return str(tmp_path / "tokenizer.json")


@pytest.fixture
def piece(tmp_path: Path) -> str:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(SAMPLE).splitlines()),
        model_writer=model,
        vocab_size=320,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "piece.model").write_bytes(model.getvalue())
    return str(tmp_path / "piece.model")


def test_bytes_are_utf8():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (258, 256, 257)
    for text in TEXTS:
        assert tokenizer.encode(text).tolist() == list(text.encode())
        assert tokenizer.decode([*tokenizer.encode(text), 256, 257]) == text
    assert tokenizer.decode([0xE6, 0x97]) == "\ufffd"  # a character cut in half


def test_byte_level_bpe_round_trips_any_text(bpe):
    tokenizer = load_tokenizer(bpe)
    assert tokenizer.vocab_size == 280
    assert tokenizer.eos_id != tokenizer.pad_id
    for text in TEXTS:
        assert tokenizer.decode([*tokenizer.encode(text), tokenizer.eos_id]) == text
    sample = tokenizer.encode(SAMPLE[0])
    assert len(sample) < len(SAMPLE[0]) / 2 and sample.max() < tokenizer.vocab_size


def test_sentencepiece_round_trips(piece):
    tokenizer = load_tokenizer(piece)
    ids = tokenizer.encode("the router sends 日本")
    assert tokenizer.decode([*ids, tokenizer.eos_id, tokenizer.pad_id]) == "the router sends 日本"
    assert ids.max() < tokenizer.vocab_size
    # The model has an eos but no padding: that id is added after its own.
    assert tokenizer.pad_id == tokenizer.vocab_size - 1 and tokenizer.eos_id != tokenizer.pad_id


def test_batches_equal_single_texts(bpe, piece):
    for name in ("bytes", bpe, piece):
        tokenizer = load_tokenizer(name)
        for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
            np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_special_ids_are_added_when_a_tokenizer_json_has_none(bpe):
    raw = Path(bpe).read_text()
    Path(bpe).write_text(raw.replace("<|endoftext|>", "<|a|>").replace("<|padding|>", "<|b|>"))
    tokenizer = load_tokenizer(bpe)
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (280, 281, 282)


def test_identity_follows_the_content(bpe, piece, tmp_path):
    copy = tmp_path / "copy.json"
    copy.write_bytes(Path(bpe).read_bytes())
    assert load_tokenizer(str(copy)).identity == load_tokenizer(bpe).identity
    other = train_bpe(iter(SAMPLE), 281, tmp_path / "other.json")
    names = {load_tokenizer(name).identity for name in ("bytes", bpe, piece)} | {other.identity}
    assert len(names) == 4


def test_the_home_folder(tmp_path, monkeypatch):
    train_bpe(iter(SAMPLE), 280, tmp_path / "own.json")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_tokenizer("~/own.json").vocab_size == 280


def test_what_is_refused(tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "bad.model").write_text("?")
    (tmp_path / "folder.json").mkdir()
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "empty.json"))
    for name, message in (
        ("gpt2", "use 'bytes', a path"),
        (str(tmp_path / "none.json"), "there is no file"),
        (str(tmp_path / "bad.json"), "is not a tokenizer.json"),
        (str(tmp_path / "folder.json"), r"folder\.json cannot be read \(Is a directory\)"),
        (str(tmp_path / "empty.json"), "has an empty vocabulary"),
        (str(tmp_path / "bad.model"), "is not a SentencePiece model"),
    ):
        with pytest.raises(UserError, match=message):
            load_tokenizer(name)
    with pytest.raises(UserError, match="258 or more"):
        train_bpe(iter(SAMPLE), 100, tmp_path / "t.json")
    with pytest.raises(UserError, match=r"end in \.json"):
        train_bpe(iter(SAMPLE), 300, tmp_path / "t.txt")
    texts = iter(SAMPLE)
    with pytest.raises(UserError, match=r"folder\.json cannot be written"):
        train_bpe(texts, 300, tmp_path / "folder.json")
    assert next(texts) == SAMPLE[0]  # the error came before any text was read


@pytest.mark.parametrize("there", [None, b"an older one"])
def test_a_failed_training_leaves_the_output_as_it_was(tmp_path, there):
    output = tmp_path / "deep" / "t.json"
    if there is not None:
        output.parent.mkdir()
        output.write_bytes(there)

    def texts():
        yield SAMPLE[0]
        raise UserError("The text ends here.")

    with pytest.raises(UserError, match="ends here"):
        train_bpe(texts(), 300, output)
    assert [path.read_bytes() for path in output.parent.iterdir()] == [there] * (there is not None)
    train_bpe(iter(SAMPLE), 300, output)
    assert [path.name for path in output.parent.iterdir()] == ["t.json"]


def test_a_full_disk_leaves_no_part_of_a_tokenizer(tmp_path, monkeypatch):
    def full(path, text, *rest, **more):
        with path.open("w") as file:
            file.write(text[:9])
        if text:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("etils.epath.gpath.PosixGPath.write_text", full)
    with pytest.raises(UserError, match=r"t\.json cannot be written \(No space left .*make room"):
        train_bpe(iter(SAMPLE), 300, tmp_path / "t.json")
    assert list(tmp_path.iterdir()) == []


def test_stored_truncation_and_padding_are_not_applied(bpe, tmp_path):
    limited = tokenizers.Tokenizer.from_file(bpe)
    limited.enable_truncation(max_length=2)
    limited.enable_padding(length=64)
    limited.save(str(tmp_path / "limited.json"))
    text = "a text of more than two tokens"
    whole = load_tokenizer(bpe).encode(text)
    assert load_tokenizer(str(tmp_path / "limited.json")).encode(text).tolist() == whole.tolist()
