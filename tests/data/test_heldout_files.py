"""Checks held-out text: from files, its share of the bytes, and its absence from training."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from moe_jax.data.build import ChunkSizes, build_store
from moe_jax.data.config import DataConfig
from moe_jax.data.store import SOURCE, START, Split, Store
from moe_jax.errors import UserError

SMALL = ChunkSizes(chunk=64, shard=512)


def write(folder: Path, **texts: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)


def contents(store: Store, split: Split) -> list[tuple[str, str]]:
    """Read (source, text) of every document of a split that the byte tokenizer encoded."""
    (tokens,) = split.read([(0, split.num_tokens)])
    bounds = [*split.documents[:, START], split.num_tokens]
    return [
        (store.sources[source], bytes(tokens[start : stop - 1].tolist()).decode())
        for (start, stop), source in zip(
            itertools.pairwise(bounds), split.documents[:, SOURCE], strict=True
        )
    ]


def build(folder: Path, lines: list[str] | None = None, **config) -> Store:
    say = [] if lines is None else lines
    return build_store(DataConfig(**config), folder / "stores", say.append, SMALL)


def test_files_are_the_whole_held_out_split_and_nothing_of_them_is_trained_on(tmp_path):
    write(tmp_path / "train", a="first", b="in both", c="third", d="first")
    write(tmp_path / "valid", v="of its own", w="in both", x="of its own")
    lines: list[str] = []
    store = build(
        tmp_path,
        lines,
        files=f"{tmp_path}/train/*.txt",
        heldout_files=f"{tmp_path}/valid/v.txt,{tmp_path}/valid/[wx].txt",
        heldout_fraction=0.5,
    )
    assert contents(store, store.train) == [("a", "first"), ("c", "third"), ("d", "first")]
    assert contents(store, store.heldout) == [
        ("v", "of its own"),
        ("w", "in both"),
        ("x", "of its own"),
    ]
    assert "train: 1 documents left out because they are also held out" in lines
    assert not [line for line in lines if "WARNING" in line]


def test_no_share_is_taken_beside_held_out_files(tmp_path):
    """data.heldout_fraction is then not used, so it is not part of the fingerprint."""
    write(tmp_path / "train", a="first", b="second", c="third")
    write(tmp_path / "valid", v="of its own")
    given = {"files": f"{tmp_path}/train/*.txt", "heldout_files": f"{tmp_path}/valid/*.txt"}
    stores = [build(tmp_path, heldout_fraction=share, **given) for share in (0.05, 0.9)]
    assert len({store.fingerprint for store in stores}) == 1
    write(tmp_path / "valid", v="other words")
    other = build(tmp_path, **given)
    assert other.fingerprint != stores[0].fingerprint
    assert contents(other, other.heldout) == [("v", "other words")]


def test_every_entry_of_a_mixture_has_its_own_held_out_files(tmp_path):
    for name in ("prose", "web"):
        write(tmp_path / name, a=f"{name} one", b=f"{name} two", c="held out of web")
        write(tmp_path / f"{name}_held", v=f"{name} held")
    write(tmp_path / "web_held", w="held out of web")
    mixture = {
        name: {"files": f"{tmp_path}/{name}/*", "heldout_files": f"{tmp_path}/{name}_held/*"}
        for name in ("prose", "web")
    }
    store = build(tmp_path, mixture=mixture)
    texts = [text for _, text in contents(store, store.train)]
    assert texts == ["prose one", "prose two", "web one", "web two"]
    assert contents(store, store.heldout) == [
        ("prose", "prose held"),
        ("web", "web held"),
        ("web", "held out of web"),
    ]
    assert store.heldout.bounds.tolist() == [0, 11, 11 + 9 + 16]


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"v": "same"}, r"data\.heldout_files contain every document of data\.files"),
        ({}, r"data\.heldout_files: no file matches"),
    ],
)
def test_splits_without_text_of_their_own_are_refused(tmp_path, held, message):
    write(tmp_path / "train", a="same", b="same")
    write(tmp_path / "valid", **held)
    with pytest.raises(UserError, match=message):
        build(tmp_path, files=f"{tmp_path}/train/*.txt", heldout_files=f"{tmp_path}/valid/*.txt")


def shares(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("WARNING")]


def test_a_share_far_from_the_one_asked_for_is_told_in_numbers(tmp_path):
    """One of two documents is held out, and it may be nearly all of the text."""
    write(tmp_path / "two", a="x", b="y" * 97)
    told: list[str] = []
    store = build(tmp_path, told, files=f"{tmp_path}/two/*.txt")
    held = len(contents(store, store.heldout)[0][1]) + 1
    assert shares(told) == [
        f"WARNING: {held / 100:.1%} of the bytes are held out, but data.heldout_fraction is 5.0%: "
        f"whole documents are held out, here 1 of 2 documents.  Use more or shorter documents, or "
        f"set data.heldout_files."
    ]
    again: list[str] = []
    build(tmp_path, again, files=f"{tmp_path}/two/*.txt")
    assert again == shares(told)  # every run that opens the store logs it


def test_shares_near_the_one_asked_for_are_not_told(tmp_path):
    write(tmp_path / "many", **{f"n{i:03d}": f"document {i:03d}" for i in range(400)})
    lines: list[str] = []
    store = build(tmp_path, lines, files=f"{tmp_path}/many/*.txt", heldout_fraction=0.2)
    held = np.diff(store.heldout.bounds)[0] / (store.heldout.num_tokens + store.train.num_tokens)
    assert 0.15 < held < 0.25 and not shares(lines)
    mixture = {
        "good": {"files": f"{tmp_path}/many/*.txt"},
        "small": {"files": f"{tmp_path}/many/n00[01].txt"},
    }
    build(tmp_path, lines, mixture=mixture, heldout_fraction=0.2)
    (line,) = shares(lines)
    assert "of the bytes of data.mixture.small are held out" in line and "of 2 documents" in line
