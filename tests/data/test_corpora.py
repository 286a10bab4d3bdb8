"""Corpora: which documents there are, in which order, under which label; and what is refused."""

import json
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from moe_jax.data.config import DataConfig
from moe_jax.data.corpora import PIECE_CHARACTERS, find_streams
from moe_jax.errors import UserError


def documents(**config) -> list:
    return [doc for stream in find_streams(DataConfig(**config)) for doc in stream.documents()]


def texts(**config) -> list[str]:
    return [doc.text for doc in documents(**config)]


def test_stdlib_is_labelled_by_package_and_leaves_tests_out():
    (stream,) = find_streams(DataConfig())
    names = {file.name: file.source for file in stream.files}
    assert names["json/decoder.py"] == "json"
    assert names["xml/dom/minidom.py"] == "xml"
    assert names["argparse.py"] == names["os.py"] == "modules"
    assert not any("site-packages" in name or "/test" in name for name in names)
    assert list(names) == sorted(names)
    found = {doc.name: doc.text for doc in stream.documents()}
    assert found["json/decoder.py#0"] == Path(json.decoder.__file__).read_text(encoding="utf-8")


def test_stdlib_skips_other_encodings_and_installed_packages(tmp_path, monkeypatch):
    for name in ("a.py", "p/b.py", "p/test/c.py", "site-packages/d.py", "config-3/e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*- \xe9")
    (tmp_path / "_sysconfigdata__linux.py").write_text("prefix = '/here'")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert texts() == ["a.py", "p/b.py"]


def test_text_files_are_documents_in_order_of_name(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_bytes(f"{name}\r\n".encode())
    found = documents(source="text", files=f"{tmp_path}/[bc].txt, {tmp_path}/a.txt")
    assert [(doc.name, doc.source, doc.text) for doc in found] == [
        ("a.txt#0", "a", "a\r\n"),
        ("b.txt#0", "b", "b\r\n"),
        ("c.txt#0", "c", "c\r\n"),
    ]


def test_many_files_share_one_label(tmp_path):
    for i in range(65):
        (tmp_path / f"{i}.txt").write_text("x")
    assert {doc.source for doc in documents(source="text", files=f"{tmp_path}/*")} == {"text"}


def test_a_single_text_file_is_cut_after_line_ends(tmp_path):
    text = "".join(f"line {i} ü\n" for i in range(3000)) + "z" * (2 * PIECE_CHARACTERS)
    (tmp_path / "all.txt").write_text(text)
    pieces = texts(source="text", files=f"{tmp_path}/all.txt")
    assert "".join(pieces) == text
    assert len(pieces) > 4 and all(0 < len(piece) <= PIECE_CHARACTERS for piece in pieces)
    assert pieces[0].endswith("\n") and pieces[1].endswith("\n")


def test_jsonl_and_parquet_read_the_field(tmp_path):
    records = [{"body": "one"}, {"body": "日本"}, {"body": ""}]
    lines = "\n".join(json.dumps(record) for record in records)
    (tmp_path / "a.jsonl").write_text(lines + "\n\n")
    table = pyarrow.table({"body": ["one", "日本", None], "other": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for kind in ("jsonl", "parquet"):
        found = texts(source=kind, files=f"{tmp_path}/*.{kind}", field="body")
        assert found == ["one", "日本"]


def test_names_do_not_depend_on_where_the_files_lie(tmp_path):
    (tmp_path / "one" / "deep").mkdir(parents=True)
    (tmp_path / "one" / "deep" / "x.txt").write_text("x")
    (tmp_path / "one" / "y.txt").write_text("y")
    shutil.copytree(tmp_path / "one", tmp_path / "other" / "two")
    config = {"source": "text", "files": f"{tmp_path}/one/**/*.txt"}
    moved = {"source": "text", "files": f"{tmp_path}/other/two/**/*.txt"}
    digests = [list(find_streams(DataConfig(**each))[0].digests()) for each in (config, moved)]
    assert digests[0] == digests[1]
    assert [name for name, _ in digests[0]] == ["deep/x.txt", "y.txt"]


def test_a_mixture_labels_by_entry(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text('{"t": "b"}')
    mixture = {
        "prose": {"source": "text", "files": f"{tmp_path}/a.txt", "weight": 3},
        "web": {"source": "jsonl", "files": f"{tmp_path}/b.jsonl", "field": "t"},
    }
    streams = find_streams(DataConfig(mixture=mixture))
    assert [(s.name, s.weight, s.sources) for s in streams] == [
        ("prose", 3.0, ("prose",)),
        ("web", 1.0, ("web",)),
    ]


BAD_FILES = {
    "missing": ("text", None, "no file matches"),
    "empty": ("text", b"", "is empty"),
    "latin": ("text", b"caf\xe9 au lait", "not UTF-8 at byte offset 3"),
    "not_json": ("jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    "not_object": ("jsonl", b'{"text": "a"}\n[1]\n', "line 2 has no text in field 'text'"),
    "no_field": ("jsonl", b'{"body": "a"}\n', "line 1 has no text in field 'text'"),
    "null_field": ("jsonl", b'{"text": null}\n', "line 1 has no text in field 'text'"),
    "half_surrogate": ("jsonl", rb'{"text": "\ud83d"}', "line 1 holds half a surrogate pair"),
    "jsonl_latin": ("jsonl", b'{"text": "caf\xe9"}\n', "line 1 is not JSON .not UTF-8 at byte 13"),
    "long_number": ("jsonl", b'{"text": ' + b"1" * 5000 + b"}", "line 1 is not JSON"),
    "deep": ("jsonl", b"[" * 200_000, "line 1 is not JSON"),
    "empty_jsonl": ("jsonl", b"", "is empty"),
    "not_parquet": ("parquet", b"PAR?", "is not a Parquet file"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_named(case, tmp_path):
    kind, content, message = BAD_FILES[case]
    if content is not None:
        (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        documents(source=kind, files=f"{tmp_path}/bad.*")
    assert "bad." in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize("cut", [200, 400])
def test_a_damaged_parquet_page_is_one_sentence(tmp_path, cut):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"{i} words of text" for i in range(500)]})
    pyarrow.parquet.write_table(table, path, compression="none", use_dictionary=False)
    raw = path.read_bytes()
    path.write_bytes(b"PAR1" + b"\xff" * cut + raw[4 + cut :])
    with pytest.raises(
        UserError, match=r"a\.parquet, row group 0, cannot be read after row 0"
    ) as error:
        documents(source="parquet", files=str(path))
    assert "\n" not in str(error.value) and str(error.value).endswith("leave it out.")


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """Root may read any file, so its refusal is played."""
    (tmp_path / "a.txt").write_text("text")
    (stream,) = find_streams(DataConfig(source="text", files=f"{tmp_path}/a.txt"))

    def refuse(*_: object):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(stream.files[0].path), "open", refuse)
    with pytest.raises(UserError, match=r"a\.txt cannot be read \(Permission denied\)"):
        list(stream.digests())


def test_a_missing_parquet_column_lists_those_there(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column 'text'.*body, n"):
        documents(source="parquet", files=f"{tmp_path}/a.parquet")
    with pytest.raises(UserError, match="row 0: column 'n' does not hold text"):
        documents(source="parquet", files=f"{tmp_path}/a.parquet", field="n")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "txt"}, "did you mean 'text'"),
        ({"source": "text", "files": " , "}, "data.files is empty"),
        ({"mixture": {"a": {"file": "x"}}}, "did you mean 'files'"),
        ({"mixture": {"a": {"files": 3}}}, "data.mixture.a.files is 3"),
        ({"mixture": {"a": {"files": "x", "weight": 0}}}, "above 0"),
        ({"mixture": {"a": {"files": "x", "weight": float("nan")}}}, "above 0"),
        ({"mixture": {"a": "x"}}, "data.mixture.a is 'x'"),
        ({"mixture": {"a": {"source": "sql"}}}, "data.mixture.a.source 'sql' is unknown"),
        ({"heldout_fraction": 1.0}, "between 0 and 1"),
        ({"sequence_length": 1}, "set 2 or more"),
    ],
)
def test_bad_configs_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        documents(**fields)


def test_a_parquet_column_that_is_not_utf8(tmp_path):
    raw = pyarrow.array([b"good", b"caf\xe9"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    config = DataConfig(source="parquet", files=f"{tmp_path}/*.parquet")
    with pytest.raises(UserError, match=r"a\.parquet row 1 is not UTF-8 \(.*0xe9"):
        [list(stream.documents()) for stream in find_streams(config)]
