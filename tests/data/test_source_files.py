"""Checks the files that `files` names: paths, globs, folders, saved datasets, names of the hub."""

import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest

from moe_jax.data.build import ChunkSizes, build_store
from moe_jax.data.config import DataConfig
from moe_jax.data.corpora import find_streams
from moe_jax.errors import UserError

TEXTS = [f"text {i}" for i in range(9)]
datasets.disable_progress_bars()


def streams(files: object, **fields):
    return find_streams(DataConfig(files=str(files), **fields))


def names(files: object, **fields) -> list[str]:
    return [file.name for stream in streams(files, **fields) for file in stream.files]


def texts(files: object, **fields) -> list[str]:
    return [doc.text for stream in streams(files, **fields) for doc in stream.documents()]


def fill(folder: Path, *files: str) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"in {name}")


def test_a_folder_is_every_file_of_a_known_suffix_below_it(tmp_path):
    fill(tmp_path, "b.txt", "a/deep/c.md", "a/c.text", "x.csv", "y.csv", "none")
    fill(tmp_path, ".hidden.txt", ".git/d.txt", "a/.d/e.txt")
    expected = ["a/c.text", "a/deep/c.md", "b.txt"]
    for files in (tmp_path, f"{tmp_path}/"):
        assert names(files) == expected
        (stream,) = streams(files)
        (note,) = stream.notes
        assert "3 files of other suffixes, left out: " in note
        assert "2 .csv" in note and "1 without suffix" in note
    fill(tmp_path, "z.jsonl")
    with pytest.raises(UserError, match=r"several kinds, jsonl \(z\.jsonl\) and text"):
        names(tmp_path)
    assert names(tmp_path, source="text") == expected
    assert names(f"{tmp_path},{tmp_path}/x.csv", source="text") == [*expected, "x.csv"]


def test_what_is_left_out_is_said_when_a_store_is_built(tmp_path):
    fill(tmp_path, "t/a.txt", "t/b.txt", "t/c.csv")
    lines: list[str] = []
    config = DataConfig(files=str(tmp_path / "t"))
    build_store(config, tmp_path / "stores", lines.append)
    assert lines[0] == f"data.files: {tmp_path}/t has 1 file of other suffixes, left out: 1 .csv"
    assert lines[1].startswith(f"building the store {tmp_path}/stores/")


def test_a_folder_of_a_bucket(tmp_path, monkeypatch):
    """The client of an object store lists it; os.walk cannot."""
    fill(tmp_path, "b.txt", "a/c.txt", ".git/d.txt", "a/x.csv")
    monkeypatch.setattr("moe_jax.data.source_files._is_remote", lambda path: True)
    monkeypatch.setattr("os.walk", lambda *_: pytest.fail("os.walk"))
    assert names(tmp_path) == ["a/c.txt", "b.txt"]


@pytest.mark.parametrize("name", ["a[1].txt", "a*.txt", "a?.txt", "[x]/b.txt"])
def test_a_path_that_exists_is_taken_as_it_is(tmp_path, name):
    fill(tmp_path, name, "a1.txt", "x/b.txt")
    assert texts(tmp_path / name) == [f"in {name}"]
    (tmp_path / name).unlink()
    assert texts(tmp_path / name) != [f"in {name}"] if "?" not in name else True


def test_commas_in_names(tmp_path):
    fill(tmp_path, "a, b.txt", "c.txt", "d,1.txt", "d,2.txt")
    assert texts(tmp_path / "a, b.txt") == ["in a, b.txt"]
    assert texts(f"{tmp_path}/a\\, b.txt, {tmp_path}/c.txt") == ["in a, b.txt", "in c.txt"]
    assert names(f"{tmp_path}/d\\,*.txt") == ["d,1.txt", "d,2.txt"]
    with pytest.raises(UserError, match=r"no file matches '.*/a'"):
        names(f"{tmp_path}/a, b.txt, {tmp_path}/c.txt")


def save(folder: Path) -> None:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder, num_shards=2)
    (folder / "cache-0.arrow").write_bytes(b"a cache of the library, not part of the dataset")


def test_a_saved_dataset_is_a_folder(tmp_path):
    save(tmp_path / "one")
    for fields in ({}, {"source": "hf"}):
        (stream,) = streams(tmp_path / "one", **fields)
        assert stream.kind == "hf"
        assert [file.name for file in stream.files] == [
            "data-00000-of-00002.arrow",
            "data-00001-of-00002.arrow",
        ]
        assert texts(tmp_path / "one", **fields) == TEXTS


def test_a_dataset_dict_needs_a_split(tmp_path):
    one = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "both")
    with pytest.raises(UserError, match=r"splits train, test: name one, such as .*/both/train\."):
        names(tmp_path / "both")
    assert texts(tmp_path / "both" / "train") == TEXTS


@pytest.mark.parametrize(
    "state",
    [
        "{",
        "[]",
        '{"_data_files": 3}',
        '{"_data_files": [{}]}',
        '{"_data_files": [{"filename": "../a"}]}',
        '{"_data_files": [{"filename": ".."}]}',
        '{"_data_files": [3]}',
    ],
)
def test_a_saved_dataset_whose_state_is_damaged(tmp_path, state):
    save(tmp_path / "one")
    (tmp_path / "one" / "state.json").write_text(state)
    with pytest.raises(UserError, match=r"state\.json does not say which files"):
        names(tmp_path / "one")


def test_a_saved_dataset_whose_files_are_cut_damaged_or_missing(tmp_path):
    save(tmp_path / "one")
    path = tmp_path / "one" / "data-00001-of-00002.arrow"
    good = path.read_bytes()
    for size in (0, 3, 100, len(good) // 2, len(good) - 8, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(UserError, match=r"data-00001-of-00002\.arrow (is|can)") as error:
            texts(tmp_path / "one")
        assert "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00002\.arrow cannot be read"):
        texts(tmp_path / "one")


def test_any_byte_of_a_saved_dataset(tmp_path):
    save(tmp_path / "one")
    path = tmp_path / "one" / "data-00000-of-00002.arrow"
    good = path.read_bytes()
    for place in range(0, len(good), 7):
        for flip in (0xFF, 0x80):
            raw = bytearray(good)
            raw[place] ^= flip
            path.write_bytes(raw)
            try:
                found = texts(tmp_path / "one", bad_records="skip")
            except UserError as error:
                assert "\n" not in str(error)
            else:
                assert all(isinstance(text, str) for text in found)


def test_a_name_of_the_hub(tmp_path, monkeypatch):
    """The library names the files of its cache, and the reader of saved datasets reads them."""
    save(tmp_path / "cache")
    asked = []

    def load(name, config, **fields):
        asked.append((name, config, fields))
        return datasets.load_from_disk(tmp_path / "cache")

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda name: ["train", "test"])
    assert texts("hf://org/name:train") == TEXTS
    assert texts("hf://org/name:en:validation") == TEXTS
    assert [(name, config, fields["split"]) for name, config, fields in asked] == [
        ("org/name", None, "train"),
        ("org/name", "en", "validation"),
    ]
    with pytest.raises(UserError, match=r"splits train, test: name one, such as hf://o/n:train\."):
        names("hf://o/n")


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(
        UserError, match=r"data\.files: hf://o/n:train cannot .*\(no route to host\)"
    ):
        names("hf://o/n:train")
    monkeypatch.setitem(__import__("sys").modules, "datasets", SimpleNamespace(__version__="3.6.0"))
    with pytest.raises(
        UserError, match=r"datasets 3\.6\.0 may run code .*pip install 'datasets>=4'"
    ):
        names("hf://o/n:train")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'moe_jax\[hf\]'"):
        names("hf://o/n:train")


def test_a_failed_build_leaves_nothing_but_whole_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_jax.data.encoding.BATCH_CHARACTERS", 100)
    small = ChunkSizes(chunk=64, shard=512)
    rows = [{"text": f"words of document {i} " * 3} for i in range(60)]
    held = [{"text": "held out"}]
    (tmp_path / "h.jsonl").write_text(json.dumps(held[0]))
    lines = [json.dumps(row) for row in rows]
    for bad, kept in ((3, False), (59, True)):  # before and after the first whole shard
        broken = [*lines[:bad], "{", *lines[bad:]]
        (tmp_path / "a.jsonl").write_text("\n".join(broken))
        root = tmp_path / f"stores{bad}"
        fields = {"files": f"{tmp_path}/a.jsonl", "heldout_files": f"{tmp_path}/h.jsonl"}
        with pytest.raises(UserError, match=rf"line {bad + 1} is not JSON"):
            build_store(DataConfig(**fields), root, layout=small)
        assert bool(list(root.iterdir())) == kept
        said: list[str] = []
        build_store(DataConfig(**fields, bad_records="skip"), root, said.append, small)
        assert any("resuming after" in line for line in said) == kept
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{"]))
    with pytest.raises(UserError):
        build_store(DataConfig(**fields), root, layout=small)
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    said = []
    build_store(DataConfig(**fields), root, said.append, small)
    (line,) = (line for line in said if "is not finished" in line)
    assert line.startswith(f"{root}/") and "Delete it" in line
