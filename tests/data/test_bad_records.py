"""Checks the policy for records without text, in every kind of file."""

import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from moe_jax.data.build import ChunkSizes, build_store
from moe_jax.data.config import DataConfig
from moe_jax.data.corpora import find_streams
from moe_jax.errors import UserError

SMALL = ChunkSizes(chunk=64, shard=512)
GOOD = [f"good text {i}" for i in range(12)]
datasets.disable_progress_bars()

# JSON lines that hold no text -> the reason that is recorded.
BAD_LINES = {
    b'{"text": ': "is not JSON",
    b'{"other": "x"}': "has no text in field 'text' (missing)",
    b'{"text": null}': "has no text in field 'text' (null)",
    b'{"text": 3}': "has no text in field 'text' (int)",
    b'{"text": ["a", null]}': "has no text in field 'text' (list)",
    b'{"text": "caf\xe9"}': "is not JSON (not UTF-8 at byte",
    b"[1]": "has no text in field 'text' (missing)",
    rb'{"text": "\ud83d"}': "holds half a surrogate pair",
}


def column(texts: list) -> pyarrow.Array:
    """Make a text column; it may hold invalid UTF-8, as other programs may write it."""
    raw = pyarrow.array(
        [text.encode() if isinstance(text, str) else text for text in texts], pyarrow.binary()
    )
    return pyarrow.Array.from_buffers(pyarrow.string(), len(raw), raw.buffers())


def write(folder: Path, kind: str) -> tuple[str, list[tuple[str, dict]]]:
    """Write good and bad records; returns `files`, and the name, place and reason of the bad."""
    folder.mkdir()
    good = [json.dumps({"text": text}).encode() for text in GOOD]
    if kind in ("jsonl", "jsonl.gz"):
        lines = [*good[:5], b"", *BAD_LINES, *good[5:]]
        raw = b"\n".join(lines) + b"\n"
        path = folder / f"a.{kind}"
        path.write_bytes(gzip.compress(raw) if kind.endswith("gz") else raw)
        return str(path), [
            (path.name, {"line": 7 + i, "reason": why}) for i, why in enumerate(BAD_LINES.values())
        ]
    if kind == "text":
        for i, text in enumerate(GOOD):
            (folder / f"{i:02d}.txt").write_text(text)
        bad = {"03a.txt": b"caf\xe9", "05a.txt": b"", "05b.txt": "x".encode("utf-16")}
        for name, raw in bad.items():
            (folder / name).write_bytes(raw)
        reasons = ("is not UTF-8 at byte offset 3", "is empty", "is UTF-16")
        return str(folder), [(n, {"reason": r}) for n, r in zip(bad, reasons, strict=True)]
    table = pyarrow.table({"text": column([*GOOD[:5], None, b"caf\xe9", *GOOD[5:]])})
    reasons = ("has no text in field 'text' (null)", "is not UTF-8")
    places = [{"row": 5 + i, "reason": reason} for i, reason in enumerate(reasons)]
    if kind == "parquet":
        pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=3)
        return str(folder), [("a.parquet", place) for place in places]
    datasets.Dataset(table).save_to_disk(folder)
    return str(folder), [("data-00000-of-00001.arrow", place) for place in places]


KINDS = ("jsonl", "jsonl.gz", "text", "parquet", "hf")


def texts(config: DataConfig) -> list[str]:
    return [doc.text for stream in find_streams(config) for doc in stream.documents()]


@pytest.mark.parametrize("kind", KINDS)
def test_stop_names_the_file_and_the_place(tmp_path, kind):
    files, bad = write(tmp_path / "a", kind)
    name, place = bad[0]
    where = "".join(f" {unit} {place[unit]}" for unit in ("line", "row") if unit in place)
    with pytest.raises(UserError) as error:
        texts(DataConfig(files=files))
    sentence = str(error.value)
    assert f"{name}{where} {place['reason']}" in sentence and "\n" not in sentence
    assert sentence.endswith(", or set data.bad_records to skip.")


@pytest.mark.parametrize("kind", KINDS)
def test_skip_leaves_them_out_counts_and_lists_them(tmp_path, kind):
    files, bad = write(tmp_path / "a", kind)
    config = DataConfig(files=files, bad_records="skip", heldout_fraction=0.2)
    assert texts(config) == GOOD
    lines: list[str] = []
    store = Path(build_store(config, tmp_path / "stores", lines.append, SMALL).path)
    listed = store.with_name(f"{store.name}.bad_records.jsonl")
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    assert len(rows) == len(bad)
    for row, (name, place) in zip(rows, bad, strict=True):
        assert Path(row.pop("file")).name == name
        assert row.pop("reason").startswith(place["reason"])
        assert row == {unit: n for unit, n in place.items() if unit != "reason"}
    named = [line for line in lines if line.startswith("bad record skipped: ")]
    assert len(named) == min(3, len(bad)) and bad[0][0] in named[0]
    assert f"{len(bad)} bad records skipped, listed in {listed}" in lines


def test_the_policy_decides_only_whether_a_store_is_built(tmp_path):
    """The same text has one store; if it lacks records, every start logs that."""
    files, _ = write(tmp_path / "a", "jsonl")
    skip = DataConfig(files=files, bad_records="skip", heldout_fraction=0.2)
    first = build_store(skip, tmp_path / "stores", layout=SMALL)
    lines: list[str] = []
    stop = DataConfig(files=files, heldout_fraction=0.2)
    again = build_store(stop, tmp_path / "stores", lines.append, SMALL)
    assert again.path == first.path
    assert lines[:1] == [
        f"the store lacks the bad records listed in {first.path}.bad_records.jsonl"
    ]


def test_more_than_the_limit_stop_the_build_and_are_listed(tmp_path):
    files, bad = write(tmp_path / "a", "jsonl")
    most = len(bad) - 2
    config = DataConfig(files=files, bad_records="skip", max_bad_records=most)
    with pytest.raises(
        UserError, match=rf", after {most} other bad records: .*, or raise data\.max_bad"
    ):
        build_store(config, tmp_path / "stores", layout=SMALL)
    (listed,) = (tmp_path / "stores").iterdir()  # and nothing else is left
    assert len(listed.read_text().splitlines()) == most + 1
    enough = DataConfig(files=files, bad_records="skip", max_bad_records=len(bad))
    build_store(enough, tmp_path / "stores", layout=SMALL)
    assert len(listed.read_text().splitlines()) == len(bad)


def test_each_entry_of_a_mixture_has_its_own_policy_and_count(tmp_path):
    one, bad = write(tmp_path / "a", "jsonl")
    two, _ = write(tmp_path / "b", "parquet")
    entries = {"web": {"files": one, "max_bad_records": len(bad)}, "books": {"files": two}}
    mixed = DataConfig(mixture=entries, bad_records="skip", max_bad_records=2)
    assert texts(mixed) == GOOD * 2
    entries["books"]["bad_records"] = "stop"
    with pytest.raises(UserError, match=r"or set data\.mixture\.books\.bad_records to skip"):
        texts(DataConfig(mixture=entries, bad_records="skip"))
    entries["web"]["bad_records"] = "ignore"
    with pytest.raises(UserError, match=r"data\.mixture\.web\.bad_records 'ignore' is unknown"):
        DataConfig(mixture=entries)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bad_records": "skipp"}, "did you mean 'skip'"),
        ({"max_bad_records": -1}, "set 0 or more"),
    ],
)
def test_bad_values_of_the_keys(fields, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**fields)
