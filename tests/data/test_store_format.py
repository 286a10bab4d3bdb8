"""Checks the additions of store format 3, and the recognition of runs with earlier formats."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from moe_jax.data.build import ChunkSizes, build_store
from moe_jax.data.corpora import find_streams
from moe_jax.data.pipeline import HeldOut
from moe_jax.data.store import BYTES, SPLITS, START
from moe_jax.data.tokenizers import load_tokenizer, train_bpe

SMALL = ChunkSizes(chunk=64, shard=512)


@pytest.fixture
def stores(config, tmp_path):
    """The corpus with a tokenizer that has a bos: without it, and with it in every document."""
    path = tmp_path / "tokenizer.json"
    train_bpe(["größe of an expert " * 9], 270, path)
    path.write_text(path.read_text().replace("<|padding|>", "<s>"))
    given = dataclasses.replace(config, tokenizer=str(path))
    begin = dataclasses.replace(given, begin_with_bos=True)
    return tuple(build_store(each, tmp_path / "s", layout=SMALL) for each in (given, begin))


def test_documents_begin_with_bos_where_the_config_says_so(stores, tmp_path):
    without, begun = stores
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert without.fingerprint != begun.fingerprint
    assert (without.bos_ids, begun.bos_ids) == ((), (tokenizer.bos_id,))
    for name in SPLITS:
        old, new = getattr(without, name), getattr(begun, name)
        assert new.num_tokens == old.num_tokens + len(old.documents)
        np.testing.assert_array_equal(old.documents[:, BYTES], new.documents[:, BYTES])
        (old_tokens,) = old.read([(0, old.num_tokens)])
        (tokens,) = new.read([(0, new.num_tokens)])
        places = np.flatnonzero(tokens == tokenizer.bos_id)
        np.testing.assert_array_equal(places, new.documents[:, START])
        np.testing.assert_array_equal(np.delete(tokens, places), old_tokens)
        assert tokenizer.decode(tokens) == tokenizer.decode(old_tokens)


@pytest.mark.parametrize("confine", [False, True])
def test_a_bos_has_no_bytes(stores, confine):
    """The bytes of all targets sum to those of the text, so bits per byte are comparable."""
    _, begun = stores
    held = HeldOut(begun, 512, 7, confine)
    batch = held.rows(0, np.arange(512))
    bos = batch.targets_BT == begun.bos_ids[0]
    assert batch.bytes_BT[batch.loss_mask_BT & bos].sum() == 0
    scored = batch.loss_mask_BT.sum()
    documents = begun.heldout.documents
    assert scored == begun.heldout.num_tokens - (len(documents) if confine else 1)
    assert batch.bytes_BT[batch.loss_mask_BT].sum() == documents[:, BYTES].sum()


def test_the_fingerprint_of_an_earlier_format_is_known_where_the_tokens_are_the_same(
    config, store, tmp_path
):
    """The test computes the fingerprint of format 2 independently."""
    (stream,) = find_streams(config)
    files = sorted(Path(config.files.split("*")[0]).rglob("*.txt"))
    digests = [
        [file.name, hashlib.sha256(path.read_bytes()).hexdigest()]
        for file, path in zip(stream.files, files, strict=True)
    ]
    payload = {
        "format": 2,
        "layout": {"chunk": 64, "shard": 512},
        "tokenizer": hashlib.sha256(b"bytes").hexdigest(),
        "heldout_fraction": 0.2,
        "streams": [["text", "text", "text", list(store.sources), digests]],
    }
    old = hashlib.sha256(json.dumps(payload).encode()).hexdigest()
    assert store.fingerprint != old
    assert store.same_text(old) and store.same_text(store.fingerprint)
    assert not store.same_text("") and not store.same_text(None)
    changed = dataclasses.replace(config, heldout_fraction=0.3)
    other = build_store(changed, tmp_path / "o", layout=SMALL)
    assert not other.same_text(old) and not other.same_text(store.fingerprint)


def test_runs_of_a_tokenizer_whose_ids_may_differ_are_not_known(stores):
    """Since format 3, control tokens that texts spell have different ids."""
    without, begun = stores
    assert begun.earlier == ()
    assert not begun.same_text(without.fingerprint)
