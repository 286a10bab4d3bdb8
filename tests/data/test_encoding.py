"""Checks that documents encoded in pieces, by any number of threads, give the same store."""

import dataclasses
import json
import threading
from pathlib import Path

import pytest

from moe_jax.data import build, encoding, long_documents
from moe_jax.data.build import ChunkSizes, build_store
from moe_jax.data.config import DataConfig
from moe_jax.data.corpora import Document
from moe_jax.data.encoding import encode_documents
from moe_jax.data.tokenizers import BytesTokenizer, train_bpe
from moe_jax.errors import UserError

SMALL = ChunkSizes(chunk=64, shard=512)


def contents(store: str) -> dict[str, bytes]:
    root = Path(store)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("tokenizer", ["bytes", "json"])
def test_pieces_and_threads_make_the_same_store(config, tmp_path, monkeypatch, tokenizer):
    """Pieces of a few characters, batches of a few pieces, one, two and five threads."""
    if tokenizer == "json":
        train_bpe(["expert route gate tokens"] * 9, 280, tmp_path / "t.json")
        config = dataclasses.replace(config, tokenizer=str(tmp_path / "t.json"))
    whole = contents(build_store(config, tmp_path / "whole", layout=SMALL).path)
    monkeypatch.setattr(long_documents, "PIECE_CHARACTERS", 7)
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 30)
    for threads in (1, 2, 5):
        monkeypatch.setattr(build, "cores", lambda threads=threads: threads)
        store = build_store(config, tmp_path / f"{threads}", layout=SMALL)
        assert contents(store.path) == whole


def test_a_mistake_in_a_thread_is_the_same_sentence_and_leaves_no_thread(monkeypatch):
    class Fails(BytesTokenizer):
        def encode_batch(self, texts):
            if "bad" in texts:
                raise UserError("t.json fails on a text: name another file.")
            return super().encode_batch(texts)

    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 1)
    documents = [Document(f"{i}", "s", "bad" if i == 7 else "good") for i in range(99)]
    found = []
    with pytest.raises(UserError, match=r"^7 to 7: t\.json fails on a text"):
        found.extend(encode_documents(iter(documents), Fails(), 2))
    assert [piece.document.name for piece in found] == list("0123456")
    asked = encode_documents(iter(documents), BytesTokenizer(), 2)
    next(asked)
    asked.close()  # as an interrupt does
    assert not [t for t in threading.enumerate() if t.name.startswith("encode")]


def test_few_documents_are_read_ahead(monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 1)
    read = []

    def documents():
        for i in range(99):
            read.append(i)
            yield Document(f"{i}", "s", "text")

    for number, _ in enumerate(encode_documents(documents(), BytesTokenizer(), 2), start=1):
        assert len(read) - number < 4


LONG = "é" * 40 + " is a word"  # 90 bytes


@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_documents_that_are_too_long_are_bad_records(tmp_path, kind):
    texts = ["short one", LONG, "short two", "short three"]
    if kind == "jsonl":
        lines = [json.dumps({"text": text}) for text in texts]
        lines.insert(3, json.dumps({"text": "x" * (2 << 20)}))  # longer than any line that is held
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
        files, places, bad = str(tmp_path / "a.jsonl"), [2, 4], 2
    else:
        for i, text in enumerate(texts):
            (tmp_path / f"{i}.txt").write_text(text)
        files, places, bad = f"{tmp_path}/*.txt", [None], 1
    fields = {"files": files, "heldout_fraction": 0.3}
    exact = DataConfig(**fields, max_document_bytes=90)
    if kind == "text":
        build_store(exact, tmp_path / "exact", layout=SMALL)
    limited = DataConfig(**fields, max_document_bytes=89)
    message = r"is longer than 89 bytes: .*raise data\.max_document_bytes, or set data\.bad_rec"
    with pytest.raises(UserError, match=message):
        build_store(limited, tmp_path / "stores", layout=SMALL)
    skip = dataclasses.replace(limited, bad_records="skip")
    store = build_store(skip, tmp_path / "stores", layout=SMALL)
    assert len(store.train.documents) + len(store.heldout.documents) == 3
    rows = Path(f"{store.path}.bad_records.jsonl").read_text().splitlines()
    assert len(rows) == bad and [json.loads(row).get("line") for row in rows] == places


def test_what_has_to_be_encoded_at_once_is_limited(tmp_path, monkeypatch):
    """A long text is a bad record if it cannot be cut, and is encoded if it can."""
    monkeypatch.setattr(long_documents, "PIECE_CHARACTERS", 9)
    monkeypatch.setattr(long_documents, "MAX_PIECE_BYTES", 50)
    train_bpe(["some text"], 258, tmp_path / "t.json")
    for name, text in (("good", "words and more words " * 9), ("bad", "a" * 51)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("a", "b", text)))
        config = DataConfig(files=str(path), tokenizer=str(tmp_path / "t.json"))
        if name == "good":
            build_store(config, tmp_path / "stores", layout=SMALL)
            continue
        with pytest.raises(UserError, match=r"line 3 has 51 bytes that the tokenizer has to enc"):
            build_store(config, tmp_path / "stores", layout=SMALL)
        bytes_ = dataclasses.replace(config, tokenizer="bytes")
        build_store(bytes_, tmp_path / "stores", layout=SMALL)
    with pytest.raises(UserError, match=r"max_document_bytes is -1: set 0"):
        DataConfig(max_document_bytes=-1)
