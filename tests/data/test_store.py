"""Checks that stores are resumable, byte-identical and split by content, and detect damage."""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_jax.data.build import ChunkSizes, build_store, open_built_store
from moe_jax.data.config import DataConfig
from moe_jax.data.corpora import find_streams
from moe_jax.data.split_writer import SplitWriter
from moe_jax.data.store import BYTES, SOURCE, SPLITS, START, open_store, read_manifest
from moe_jax.data.tokenizers import BytesTokenizer, train_bpe
from moe_jax.errors import UserError

SMALL = ChunkSizes(chunk=64, shard=512)  # as in conftest.py


def contents(store_path: str | Path) -> dict[str, bytes]:
    """Read every file under a store."""
    root = Path(store_path)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def split_documents(store, name: str) -> list[str]:
    """Decode the documents of a split, without the eos that must end each."""
    split = getattr(store, name)
    (tokens,) = split.read([(0, split.num_tokens)])
    starts = [*split.documents[:, START], split.num_tokens]
    found = []
    for start, stop in itertools.pairwise(starts):
        assert tokens[stop - 1] == store.eos_id
        found.append(bytes(tokens[start : stop - 1].tolist()).decode())
    return found


def test_a_store_holds_every_document_once_in_order(store, config):
    documents = [doc.text for stream in find_streams(config) for doc in stream.documents()]
    held_out = [
        int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 < config.heldout_fraction
        for text in documents
    ]
    for name in SPLITS:
        expected = [t for t, h in zip(documents, held_out, strict=True) if h == (name == "heldout")]
        assert expected and split_documents(store, name) == expected


def test_a_store_that_is_only_looked_for_is_never_built(store, config, tmp_path):
    root = tmp_path / "elsewhere"
    with pytest.raises(UserError, match=r"There is no store .*: build it with"):
        open_built_store(config, root, layout=SMALL)
    assert not root.exists()
    found = open_built_store(config, Path(store.path).parent, layout=SMALL)
    assert found.fingerprint == store.fingerprint


def test_documents_know_their_bytes_and_source(store, corpus):
    by_label = {p.relative_to(corpus).with_suffix("").as_posix(): p for p in corpus.rglob("*.txt")}
    assert sorted(by_label) == list(store.sources)
    for _, size, source in np.concatenate([store.train.documents, store.heldout.documents]):
        assert size == by_label[store.sources[source]].stat().st_size + 1


def test_copies_of_a_document_stay_in_one_split(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"text {i % 12}")
    config = DataConfig(source="text", files=f"{tmp_path}/*.txt", heldout_fraction=0.3)
    store = build_store(config, tmp_path / "stores", layout=SMALL)
    train, heldout = (split_documents(store, name) for name in SPLITS)
    assert len(train) + len(heldout) == 60 and train and heldout
    assert not set(train) & set(heldout)


def test_something_is_held_out_of_every_stream_however_small_the_share(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(4):
            (tmp_path / name / f"{i}.txt").write_text(f"text {i}")  # the same in both
    mixture = {name: {"files": f"{tmp_path}/{name}/*"} for name in "ab"}
    store = build_store(DataConfig(mixture=mixture, heldout_fraction=1e-9), tmp_path / "stores")
    assert np.bincount(store.heldout.documents[:, SOURCE]).tolist() == [1, 1]
    assert len(set(split_documents(store, "heldout"))) == 1
    assert not set(split_documents(store, "train")) & set(split_documents(store, "heldout"))


def test_a_corpus_of_one_document_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("alone")
    (tmp_path / "b.txt").write_text("alone")
    with pytest.raises(UserError, match="at least two different documents"):
        build_store(DataConfig(source="text", files=f"{tmp_path}/?.txt"), tmp_path / "stores")
    (tmp_path / "c.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="holds no documents"):
        build_store(DataConfig(source="jsonl", files=f"{tmp_path}/c.jsonl"), tmp_path / "stores")


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("step", ["_write_tokens", "_write_part", "_write_documents"])
def test_a_build_stopped_anywhere_goes_on_to_the_same_bytes(
    step, config, store, tmp_path, monkeypatch
):
    """The build stops after the first, the middle or the last call of one kind of write."""
    whole, real = contents(store.path), getattr(SplitWriter, step)
    calls = []

    def counted(*args):
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(SplitWriter, step, counted)
    build_store(config, tmp_path / "count", layout=SMALL)
    assert len(calls) >= len(SPLITS)
    for fatal in {1, len(calls) // 2, len(calls)}:
        count = 0

        def dying(*args, fatal=fatal):
            nonlocal count
            count += 1
            real(*args)
            if count == fatal:
                raise StoppedError

        root = tmp_path / f"{fatal}"
        monkeypatch.setattr(SplitWriter, step, dying)
        with pytest.raises(StoppedError):
            build_store(config, root, layout=SMALL)
        assert read_manifest(root / store.fingerprint[:16]) is None
        monkeypatch.setattr(SplitWriter, step, real)
        again = build_store(config, root, layout=SMALL)
        assert contents(again.path) == whole
        shutil.rmtree(root)


def test_a_resumed_build_does_not_tokenise_finished_shards_again(
    config, store, tmp_path, monkeypatch
):
    def build_until(shards: int) -> int:
        """Count the tokens that a build encodes until it stops after `shards` shards."""
        given, written = [], []
        encode, write = BytesTokenizer.encode_batch, SplitWriter._write_part

        def watched(self, texts):
            given.extend(texts)
            return encode(self, texts)

        def dying(self, rows):
            write(self, rows)
            written.append(rows)
            if len(written) == shards:
                raise StoppedError

        with monkeypatch.context() as patch:
            patch.setattr(BytesTokenizer, "encode_batch", watched)
            patch.setattr(SplitWriter, "_write_part", dying)
            with contextlib.suppress(StoppedError):
                build_store(config, tmp_path / "resumed", layout=SMALL)
        return sum(len(text.encode()) + 1 for text in given)

    total = store.train.num_tokens + store.heldout.num_tokens
    shards = store.train.num_tokens // SMALL.shard
    build_until(shards)
    rest = build_until(0)
    longest = max(store.train.documents[:, BYTES])
    assert rest <= total - shards * SMALL.shard + longest < total


def test_a_killed_process_leaves_a_build_that_goes_on(config, store, tmp_path, cli_env):
    script = f"""
import os, signal
from moe_jax.data.build import ChunkSizes, build_store
from moe_jax.data.config import DataConfig
lines = []
def progress(line):
    lines.append(line)
    if len(lines) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
config = DataConfig(source="text", files={config.files!r}, heldout_fraction=0.2)
build_store(config, {str(tmp_path / "killed")!r}, progress, ChunkSizes(64, 512))
"""
    done = subprocess.run([sys.executable, "-c", script], env=cli_env, timeout=120)
    assert done.returncode == -signal.SIGKILL
    folder = tmp_path / "killed" / store.fingerprint[:16]
    assert read_manifest(folder) is None and list(folder.rglob("parts/*"))
    lines = []
    build_store(config, tmp_path / "killed", lines.append, SMALL)
    assert any("resuming" in line for line in lines)
    assert contents(folder) == contents(store.path)


def test_a_finished_store_is_opened_not_built(config, store, tmp_path):
    before = contents(store.path)
    lines = []
    again = build_store(config, tmp_path / "stores", lines.append, SMALL)
    assert lines == [] and again.path == store.path and contents(store.path) == before


def test_opening_a_finished_store_writes_nothing(config, store, tmp_path):
    """Its disk may be mounted read-only, so that no lock file can be created."""
    for lock in (tmp_path / "stores").glob("*.lock"):
        lock.unlink()
    build_store(config, tmp_path / "stores", layout=SMALL)
    assert [entry.name for entry in (tmp_path / "stores").iterdir()] == [Path(store.path).name]


def test_whatever_changes_the_tokens_changes_the_fingerprint(config, store, corpus, tmp_path):
    def fingerprint(layout=SMALL, **changes) -> str:
        return build_store(
            dataclasses.replace(config, **changes), tmp_path / "s", layout=layout
        ).fingerprint

    train_bpe(["some text"], 258, tmp_path / "tokenizer.json")
    moved = tmp_path / "elsewhere"
    shutil.copytree(corpus, moved)
    assert fingerprint() == store.fingerprint
    assert fingerprint(files=f"{moved}/*/*.txt") == store.fingerprint
    assert fingerprint(sequence_length=17, store="x") == store.fingerprint
    others = [
        fingerprint(tokenizer=str(tmp_path / "tokenizer.json")),
        fingerprint(heldout_fraction=0.3),
        fingerprint(files=f"{corpus}/a/*.txt"),
        fingerprint(layout=ChunkSizes(64, 1024)),
    ]
    (moved / "a" / "01.txt").write_text("changed")
    others.append(fingerprint(files=f"{moved}/*/*.txt"))
    assert len({store.fingerprint, *others}) == 6


def test_a_renamed_store_is_refused(config, store, tmp_path):
    wrong = tmp_path / "stores" / store.fingerprint[:16]
    other = build_store(
        dataclasses.replace(config, heldout_fraction=0.5), tmp_path / "o", layout=SMALL
    )
    shutil.rmtree(wrong)
    shutil.copytree(other.path, wrong)
    with pytest.raises(UserError, match="whose fingerprint is not its name"):
        build_store(config, tmp_path / "stores", layout=SMALL)


def test_another_format_is_refused(store):
    manifest = Path(store.path) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 3', '"format": 0'))
    with pytest.raises(UserError, match="store format 0"):
        open_store(store.path)
    manifest.unlink()
    with pytest.raises(UserError, match="no finished store"):
        open_store(store.path)


def test_a_deleted_shard_is_an_error_not_zeros(store):
    os.remove(Path(store.path) / "train/tokens/c/1")
    split = open_store(store.path).train
    assert len(split.read([(0, SMALL.shard)])[0]) == SMALL.shard
    with pytest.raises(UserError, match="cannot be read"):
        split.read([(SMALL.shard + 3, SMALL.shard + 9)])


@pytest.mark.parametrize("place", range(0, 2 * 512, 99))
def test_a_flipped_bit_is_an_error(store, place):
    path = Path(store.path) / "train/tokens/c/0"
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match="cannot be read"):
        open_store(store.path).train.read([(0, SMALL.shard)])


def test_damaged_documents_are_an_error(store):
    path = Path(store.path) / "heldout/documents/c/0/0"
    raw = bytearray(path.read_bytes())
    raw[5] ^= 16
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"cannot be read .*heldout"):
        open_store(store.path)
    path.unlink()
    with pytest.raises(UserError, match=r"cannot be read .*heldout"):
        open_store(store.path)


def test_text_of_zeros_is_stored(tmp_path):
    """A chunk equal to the fill value is written, so a missing chunk means damage."""
    for i in range(4):
        (tmp_path / f"{i}.txt").write_bytes(b"\0" * (100 + i))
    config = DataConfig(source="text", files=f"{tmp_path}/*.txt")
    store = build_store(config, tmp_path / "stores", layout=SMALL)
    assert sum(len(text) for name in SPLITS for text in split_documents(store, name)) == 406


def test_ids_beyond_the_vocabulary_are_refused(config, store, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"ids reach 257.*set it to 258"):
        store.check_vocabulary(257)
    store.check_vocabulary(258)
    monkeypatch.setattr(BytesTokenizer, "vocab_size", 200)
    with pytest.raises(UserError, match=r"\.txt#0: the tokenizer gives ids .* has 200\. Use"):
        build_store(config, tmp_path / "beyond", layout=SMALL)


def test_a_folder_that_cannot_be_written_is_named(config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot be written.*set data\.store"):
        build_store(config, tmp_path / "file" / "stores")
