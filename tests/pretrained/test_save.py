"""`save` writes a self-contained model that `load` and --init_from accept."""

import io
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import sentencepiece
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from old_workdir import DEVICES, STEP, config_of, unpack
from trained import copy_with, digest, tokens

import moe_jax
from moe_jax.checkpoint import Checkpoints, array_digest, named_leaves
from moe_jax.cli import checkpoint as checkpoint_command
from moe_jax.config import read_config
from moe_jax.data.tokenizers import BytesTokenizer, load_tokenizer, train_bpe
from moe_jax.pretrained.tokenizer import byte_level_json, save_tokenizer
from moe_jax.run.restore import restore_or_init_state
from moe_jax.run.setup import prepare

SPECIAL = st.sampled_from(
    ["<|endoftext|>", "<|padding|>", "<|im_end|>", "</s>", "\x00", "\r\n", " ", "🙂", "e\u0301"]
)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # surrogates alone have no UTF-8


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    return unpack(tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="module")
def tiny(unpacked) -> moe_jax.LoadedModel:
    """The workdir of an earlier version, whose tokens are bytes."""
    return moe_jax.load(unpacked / "run")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny.save(folder)
    return folder


@pytest.fixture(scope="module")
def written_tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(byte_level_json())
    return load_tokenizer(str(path))


def test_the_saved_folder_loads_bitwise(saved, tiny):
    assert sorted(os.listdir(saved)) == ["checkpoints", "config.json", "tokenizer.json"]
    back = moe_jax.load(saved)
    assert (back.step, back.run_config, digest(back)) == (STEP, tiny.run_config, digest(tiny))
    np.testing.assert_array_equal(back.router_state["bias"], tiny.router_state["bias"])
    np.testing.assert_array_equal(back.logits(tokens(3)), tiny.logits(tokens(3)))
    assert read_config(saved / "config.json") == tiny.run_config


def test_it_holds_weights_and_router_state_alone(saved):
    names = Checkpoints(saved / "checkpoints").describe(STEP)
    assert {name.split("/")[0] for name in names} == {"step", "params", "router"}


def test_the_checkpoint_command_reads_it(saved, tiny, capsys):
    assert checkpoint_command.main(["checkpoint", f"--workdir={saved}", "--verify"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"step {STEP}  ok ") and line.endswith(digest(tiny))


def test_a_run_starts_from_it(unpacked, saved, tiny, monkeypatch):
    monkeypatch.chdir(unpacked)  # the config names the text files and the store by relative paths
    lines: list[str] = []
    devices = jax.devices()[:DEVICES]
    run = prepare(config_of(unpacked), unpacked / "new", lines.append, devices)
    state = restore_or_init_state(run, str(saved), lines.append)
    leaves = named_leaves(state.params)
    assert array_digest((name, leaves[name]) for name in sorted(leaves)) == digest(tiny)
    np.testing.assert_array_equal(state.router["bias"], tiny.router_state["bias"])
    assert int(state.step) == 0 and lines[-1] == f"starting from the weights in {saved}"


def test_a_folder_that_is_in_use_is_refused(saved, tiny, tmp_path):
    before = sorted(os.listdir(saved))
    (tmp_path / "file").write_text("")
    for there in (saved, tmp_path / "file"):
        with pytest.raises(moe_jax.UserError, match="not an empty folder: name one that does not"):
            tiny.save(there)
    with pytest.raises(moe_jax.UserError, match=r"cannot be written \(Not a directory\)"):
        tiny.save(tmp_path / "file" / "below")
    assert sorted(os.listdir(saved)) == before
    (tmp_path / "empty").mkdir()
    tiny.save(tmp_path / "empty")
    assert moe_jax.load(tmp_path / "empty").step == STEP


def test_a_folder_that_was_cut_short_is_not_taken(tiny, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moe_jax.pretrained.folder.sealed_json", fails)  # written last
    with pytest.raises(moe_jax.UserError, match=r"cannot be written \(No space left"):
        tiny.save(tmp_path / "model")
    with pytest.raises(moe_jax.UserError, match="is missing: restore it"):
        moe_jax.load(tmp_path / "model")


def test_what_names_the_end_token_is_saved_beside_the_tokenizer(tmp_path):
    train_bpe(["some text"], 262, tmp_path / "a" / "tokenizer.json")
    file = tmp_path / "a" / "tokenizer.json"
    file.write_text(file.read_text().replace("<|padding|>", "<|end_of_text|>"))
    (file.parent / "tokenizer_config.json").write_text('{"eos_token": "<|end_of_text|>"}')
    (tmp_path / "b").mkdir()
    save_tokenizer(str(file), epath.Path(tmp_path / "b"))
    first, second = (load_tokenizer(str(tmp_path / x / "tokenizer.json")) for x in "ab")
    assert first.eos_id == second.eos_id == 1 and first.identity == second.identity


@given(st.lists(SPECIAL | ANY_TEXT).map("".join))
def test_byte_tokenizer_file_encodes_any_text_alike(written_tokenizer, text):
    ids = written_tokenizer.encode(text)
    assert ids.tolist() == BytesTokenizer().encode(text).tolist()
    assert written_tokenizer.decode(ids) == text


@given(st.lists(st.integers(0, 300)))
def test_byte_tokenizer_file_decodes_any_ids_alike(written_tokenizer, ids):
    """Also for invalid UTF-8, special ids and ids beyond the vocabulary."""
    assert written_tokenizer.decode(ids) == BytesTokenizer().decode(ids)


def test_byte_tokenizer_file_has_the_same_special_ids(written_tokenizer):
    for name in ("vocab_size", "eos_id", "pad_id"):
        assert getattr(written_tokenizer, name) == getattr(BytesTokenizer, name)


def write_bpe(folder: Path) -> Path:
    train_bpe(iter(["the router sends every token to an expert"]), 258, folder / "bpe.json")
    return folder / "bpe.json"


def write_sentencepiece(folder: Path) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the router sends every token to an expert"] * 9),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "piece.model").write_bytes(model.getvalue())
    return folder / "piece.model"


@pytest.mark.parametrize(
    "write", [write_bpe, pytest.param(write_sentencepiece, marks=pytest.mark.lifecycle)]
)
def test_a_tokenizer_file_is_copied(unpacked, tmp_path, write):
    """A saved model depends on no other file of the machine that trained it."""
    source = write(tmp_path)
    run = copy_with(unpacked / "run", tmp_path / "run", data={"tokenizer": str(source)})
    loaded = moe_jax.load(run)
    loaded.save(tmp_path / "saved")
    raw = source.read_bytes()
    source.unlink()

    text = "the router sends every token"
    ids = loaded.tokenizer.encode(text)
    back = moe_jax.load(tmp_path / "saved")
    copied = tmp_path / "saved" / f"tokenizer{source.suffix}"
    assert back.tokenizer_name == str(copied) and copied.read_bytes() == raw
    assert back.tokenizer.encode(text).tolist() == ids.tolist()
    back.save(tmp_path / "again")
    assert (tmp_path / "again" / copied.name).read_bytes() == raw

    with pytest.raises(moe_jax.UserError, match="there is no file"):
        loaded.save(tmp_path / "other")
    with pytest.raises(moe_jax.UserError, match="is missing: restore it, or put a copy"):
        moe_jax.load(run)
    (run / copied.name).write_bytes(raw)
    assert moe_jax.load(run).tokenizer.decode(ids) == text
