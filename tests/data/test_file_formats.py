"""Checks that every kind of file gives the documents of the plain file that it was made from."""

import bz2
import gzip
import io
import json
import lzma
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from moe_jax.data.build import ChunkSizes, build_store
from moe_jax.data.compressed import FREE_BYTES, MAX_RATIO
from moe_jax.data.config import DataConfig
from moe_jax.data.corpora import find_streams
from moe_jax.data.store import SPLITS
from moe_jax.errors import UserError

SMALL = ChunkSizes(chunk=64, shard=512)
TEXTS = [f"document {i}: größe 日本 🙂 {'word ' * i}" for i in range(40)]
datasets.disable_progress_bars()


def zstd(raw: bytes) -> bytes:
    return pyarrow.compress(raw, codec="zstd", asbytes=True)


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def documents(files: object, **fields) -> list[str]:
    config = DataConfig(files=str(files), **fields)
    return [doc.text for stream in find_streams(config) for doc in stream.documents()]


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write(folder: Path, kind: str) -> str:
    """Write the texts to files of a kind; returns the value of `files`."""
    folder.mkdir()
    if kind.startswith(".txt"):
        for i, text in enumerate(TEXTS):
            raw = text.encode()
            packed = COMPRESS[kind[4:]](raw) if kind[4:] else raw
            (folder / f"{i:02d}{kind}").write_bytes(packed)
        return str(folder)
    raw = lines(TEXTS)
    table = pyarrow.table({"text": TEXTS})
    if kind.startswith(".jsonl"):
        (folder / f"a{kind}").write_bytes(COMPRESS[kind[6:]](raw) if kind[6:] else raw)
    elif kind == "parquet":
        pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=7)
    elif kind == "binary":
        table = pyarrow.table({"text": [text.encode() for text in TEXTS]})
        pyarrow.parquet.write_table(table, folder / "a.parquet")
    else:
        datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder, num_shards=3)
    return str(folder)


def tokens(config: DataConfig, root: Path) -> dict[str, np.ndarray]:
    store = build_store(config, root, layout=SMALL)
    splits = {name: getattr(store, name) for name in SPLITS}
    return {name: split.read([(0, split.num_tokens)])[0] for name, split in splits.items()}


def test_a_store_of_each_format_has_the_tokens_of_the_plain_one(tmp_path):
    kinds = [f"{plain}{suffix}" for plain in (".txt", ".jsonl") for suffix in ("", *COMPRESS)]
    found = {}
    for kind in (*kinds, "parquet", "binary", "hf"):
        config = DataConfig(files=write(tmp_path / kind, kind), heldout_fraction=0.2)
        found[kind] = tokens(config, tmp_path / "stores")
    for kind, splits in found.items():
        for name in SPLITS:
            assert np.array_equal(splits[name], found[".txt"][name]), (kind, name)
    assert len(found[".txt"]["heldout"]) > 200


def test_sources_of_compressed_files_are_those_of_the_plain_ones(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a"))
    (tmp_path / "b.TXT.XZ").write_bytes(lzma.compress(b"b"))
    (stream,) = find_streams(DataConfig(files=f"{tmp_path}/*"))
    assert (stream.kind, stream.sources) == ("text", ("a", "b"))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_all_members_are_read(tmp_path, suffix):
    """A member larger than a buffer, an empty one, and member ends at all offsets of a block."""
    rng = np.random.default_rng(0)
    members = [bytes(rng.integers(97, 105, n, np.uint8)) for n in (700_000, 0, 3)]
    members += [bytes([97 + i % 26]) * (i % 50) for i in range(60 if suffix == ".xz" else 4000)]
    packed = [COMPRESS[suffix](member) for member in members]
    (tmp_path / f"a.txt{suffix}").write_bytes(b"".join(packed))
    assert "".join(documents(tmp_path / f"a.txt{suffix}")).encode() == b"".join(members)
    if suffix in (".gz", ".xz"):  # formats with padding
        (tmp_path / f"a.txt{suffix}").write_bytes(packed[2] + b"\0" * 8 + packed[2] + b"\0" * 512)
        assert "".join(documents(tmp_path / f"a.txt{suffix}")).encode() == members[2] * 2


@pytest.mark.parametrize("suffix", COMPRESS)
def test_what_is_cut_or_damaged_is_one_sentence(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    member = COMPRESS[suffix](lines([os.urandom(40).hex() for _ in range(300)]))
    cuts = [member[:5], member[: len(member) // 2], member[:-1], member + member[:-9]]
    for raw in cuts:
        path.write_bytes(raw)
        with pytest.raises(UserError, match=rf"a\.jsonl\{suffix} is truncated: .* Copy") as error:
            documents(path)
        assert "\n" not in str(error.value)
    flipped = bytearray(member)
    flipped[len(member) // 2] ^= 255
    damaged = {b"plain text": "", member + b"rubbish": "", member + bytes(flipped): ""}
    if suffix == ".zst":  # Arrow writes no checksum
        damaged.pop(member + bytes(flipped))
    for raw in damaged:
        path.write_bytes(raw)
        with pytest.raises(UserError, match=rf"a\.jsonl\{suffix} (cannot be dec|is tr)") as error:
            documents(path)
        assert "\n" not in str(error.value) and str(error.value).endswith("leave it out.")
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"is empty: remove it"):
        documents(path)


def test_a_zstd_checksum_is_looked_at(tmp_path):
    """A frame by hand of the word `text`: magic, header with checksum, one raw block, checksum."""
    frame = bytes.fromhex("28b52ffd" + "2404" + "210000") + b"text" + bytes.fromhex("9e5be3c1")
    (tmp_path / "a.txt.zst").write_bytes(frame)
    with pytest.raises(UserError, match="checksum"):
        documents(tmp_path / "a.txt.zst")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_bomb_is_one_sentence(tmp_path, suffix, monkeypatch):
    """The limits are those of Parquet, lowered for the test."""
    monkeypatch.setattr("moe_jax.data.compressed.FREE_BYTES", FREE_BYTES // 1000)
    monkeypatch.setattr("moe_jax.data.compressed.MAX_RATIO", MAX_RATIO // 100)
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](b"a" * (4 << 20)))
    with pytest.raises(UserError, match=r"expands without bound: its [\d,]+ bytes"):
        documents(path)


def test_a_byte_order_mark_is_no_text(tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + b"text")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(mark + b"more" + mark))
    (tmp_path / "c.jsonl").write_bytes(mark + lines(["line"]))
    assert documents(f"{tmp_path}/*.txt*") == ["text", "more\ufeff"]
    assert documents(tmp_path / "c.jsonl") == ["line"]
    (tmp_path / "d.txt").write_bytes(b"text")
    digests = [
        next(find_streams(DataConfig(files=f"{tmp_path}/{name}.txt"))[0].digests())[1]
        for name in "ad"
    ]
    assert digests[0] == digests[1]  # the content is the same without the mark
    (tmp_path / "e.txt").write_bytes(mark + b"ab\xff")
    with pytest.raises(UserError, match="not UTF-8 at byte offset 5"):
        documents(tmp_path / "e.txt")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-be"])
def test_another_encoding_is_named(tmp_path, encoding):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes((mark + '{"text": "words"}').encode(encoding))
        named = encoding[:6].upper()
        with pytest.raises(UserError, match=rf"{name} is {named}, by its .*: convert it to UTF-8"):
            documents(tmp_path / name)


def columns(folder: Path) -> dict[str, str]:
    """Write the same records as JSON lines, Parquet and a saved dataset."""
    rows = [
        {"meta": {"text": "one", "tags": ["a", "b"]}, "n": 1, "dotted.name": "x"},
        {"meta": {"text": "two", "tags": []}, "n": 2, "dotted.name": "y"},
    ]
    raw = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "a.jsonl").write_text(raw)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return {kind: f"{folder}/{name}" for kind, name in FILES.items()}


FILES = {"jsonl": "a.jsonl", "parquet": "a.parquet", "hf": "saved"}


def test_nested_fields_and_lists(tmp_path):
    for kind, files in columns(tmp_path).items():
        assert documents(files, field="meta.text") == ["one", "two"], kind
        assert documents(files, field="dotted.name") == ["x", "y"], kind
        assert documents(files, field="meta.tags") == ["a\nb"], kind  # joined by newlines
        with pytest.raises(UserError, match=r"set data\.field to"):
            documents(files, field="meta.missing")
        with pytest.raises(UserError, match=r"set data\.field to"):
            documents(files, field="n")
        with pytest.raises(UserError, match=r"set data\.field to"):
            documents(files, field="meta")
    with pytest.raises(UserError, match=r"one of meta\.text, meta\.tags, n, dotted\.name"):
        documents(tmp_path / "a.parquet", field="x")


def test_many_texts_below_a_struct_and_in_lists(tmp_path):
    """The file has more rows than are read at once; texts repeat, so Arrow keeps them once."""
    rows = [{"meta": {"text": f"text {i % 7}", "tags": [f"{i}", "t"]}} for i in range(3000)]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2500
    )
    found = documents(tmp_path / "a.parquet", field="meta.text")
    assert found == [row["meta"]["text"] for row in rows]
    found = documents(tmp_path / "a.parquet", field="meta.tags")
    assert found == [f"{i}\nt" for i in range(3000)]


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch):
    for name in ("pyarrow", "pyarrow.parquet", "pyarrow.ipc", "pyarrow.compute"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    (tmp_path / "a.parquet").write_bytes(b"x")
    for name in ("a.txt.zst", "a.parquet"):
        with pytest.raises(UserError, match=r"pip install 'moe_jax\[data\]'"):
            documents(tmp_path / name)


class Remote(io.BytesIO):
    """Stands in for a file object of an object store's client."""

    name, mode = "gs://bucket/a", "rb"


def test_a_bucket_is_read_through_the_same_readers(tmp_path, monkeypatch):
    """The client of gs:// gives file objects, which are not files of the host."""
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(lines(TEXTS)))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS)))
    for name in ("a.jsonl.zst", "a.jsonl.gz"):
        (stream,) = find_streams(DataConfig(files=f"{tmp_path}/{name}"))
        path = type(stream.files[0].path)
        raw = (tmp_path / name).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(path, "open", lambda self, mode, raw=raw: Remote(raw))
            assert [doc.text for doc in stream.documents()] == TEXTS
