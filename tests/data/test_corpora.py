"""Checks the documents of a corpus, their order and labels, and the refused inputs."""

import json
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from moe_jax.data.compressed import FREE_BYTES, MAX_RATIO
from moe_jax.data.config import DataConfig
from moe_jax.data.corpora import find_streams
from moe_jax.data.readers import PIECE_CHARACTERS
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


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("a.txt", "text"), ("a.TXT", "text"), ("b.text", "text"), ("c.md", "text")),
        *(("d.jsonl", "jsonl"), ("e.ndjson", "jsonl"), ("f.parquet", "parquet")),
    ],
)
def test_named_files_are_never_the_standard_library(tmp_path, name, kind):
    """Without data.source, and in an entry of a mixture, the suffix decides how to read them."""
    path = tmp_path / name
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": ["words"]}), path)
    else:
        path.write_text('{"text": "words"}' if kind == "jsonl" else "words")
    for config in ({"files": str(path)}, {"mixture": {"a": {"files": str(path)}}}):
        (stream,) = find_streams(DataConfig(**config))
        assert stream.kind == kind and [doc.text for doc in stream.documents()] == ["words"]


CONTRADICTIONS = {
    "unknown suffix": (
        {"files": "{0}/a.py"},
        r"data\.files: the suffix of 'a\.py' .*set data\.so",
    ),
    "no suffix": ({"files": "{0}/none"}, r"the suffix of 'none' does not tell"),
    "mixed": (
        {"files": "{0}/a.txt,{0}/b.jsonl"},
        r"data\.files are of several kinds, jsonl \(b\.jsonl\) and text \(a\.txt\)",
    ),
    "mixed with held-out files": (
        {"files": "{0}/a.txt", "heldout_files": "{0}/b.jsonl"},
        r"several kinds, jsonl",
    ),
    "an archive": ({"files": "{0}/c.zip"}, r"c\.zip is compressed \(\.zip\)\. .*: unpack it"),
    "an archive, and a source": (
        {"files": "{0}/c.tar.gz", "source": "jsonl"},
        r"c\.tar\.gz is compressed \(\.gz\)",
    ),
    "compressed Parquet": ({"files": "{0}/c.parquet.gz"}, r"is compressed \(\.gz\)"),
    "in a mixture": (
        {"mixture": {"m": {"files": "{0}/a.py"}}},
        r"data\.mixture\.m\.files: the suffix of .*set data\.mixture\.m\.source",
    ),
    "files beside a mixture": (
        {"files": "{0}/a.txt", "mixture": {"m": {"files": "{0}/b.jsonl"}}},
        r"data\.files is set beside data\.mixture",
    ),
    "held-out files beside a mixture": (
        {"heldout_files": "{0}/a.txt", "mixture": {"m": {"files": "{0}/b.jsonl"}}},
        r"data\.heldout_files is set beside data\.mixture",
    ),
    "held-out files of the standard library": (
        {"heldout_files": "{0}/a.txt"},
        r"data\.heldout_files is set without data\.files",
    ),
    "held-out files in one entry": (
        {
            "mixture": {
                "m": {"files": "{0}/a.txt", "heldout_files": "{0}/a.txt"},
                "n": {"files": "{0}/a.txt"},
            }
        },
        r"data\.mixture\.n\.heldout_files is empty, but other entries",
    ),
    "standard library with files": (
        {"mixture": {"m": {"source": "stdlib", "files": "{0}/a.txt"}}},
        r"data\.mixture\.m\.source is 'stdlib', which has files of its own",
    ),
    "a folder without text": (
        {"files": "{0}/empty"},
        r"data\.files: the folder '.*/empty' has no files of a known suffix",
    ),
    "a folder without such text, in a mixture": (
        {"mixture": {"m": {"files": "{0}/empty/", "source": "text"}}},
        r"data\.mixture\.m\.files: the folder '.*/empty' has no text files",
    ),
    "s3": (
        {"files": "s3://b/a.txt"},
        r"data\.files is 's3://b/a\.txt': s3:// is not supported",
    ),
    "s3 among others": ({"files": "{0}/a.txt, S3://b/*.txt"}, r"S3:// is not supported"),
    "https": ({"files": "https://x.y/a.txt"}, r"https:// is not supported: download it"),
    "hf": ({"files": "hf://datasets/o/d/a.txt"}, r"hf:// is not supported: download it"),
    "file": ({"files": "file:///a.txt"}, r"file:// is not supported"),
    "hf held out": (
        {"files": "{0}/a.txt", "heldout_files": "hf://datasets/o/d/a.txt"},
        r"data\.heldout_files is 'hf://datasets/o/d/a\.txt'",
    ),
}


def placed(value, folder: Path):
    """Replace {0} in the texts of `value` by the folder."""
    if isinstance(value, dict):
        return {key: placed(one, folder) for key, one in value.items()}
    return value.replace("{0}", str(folder))


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_files_that_cannot_be_meant_are_one_sentence(case, tmp_path):
    for name in ("a.txt", "a.py", "none", "c.zip", "c.tar.gz", "c.parquet.gz", "empty/a.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("words")
    (tmp_path / "b.jsonl").write_text('{"text": "words"}')
    fields, message = CONTRADICTIONS[case]
    with pytest.raises(UserError, match=message) as error:
        documents(**placed(fields, tmp_path))
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_a_source_that_is_set_reads_files_of_any_name(tmp_path):
    (tmp_path / "a.py").write_text("import os")
    for name in ("a.py", "*.py"):
        assert texts(source="text", files=f"{tmp_path}/{name}") == ["import os"]


def test_a_bucket_without_its_client_is_one_sentence(tmp_path, monkeypatch):
    def missing(*_: object):
        raise ImportError("No module named 'gcsfs'")

    monkeypatch.setattr("etils.epath.gpath.PosixGPath.glob", missing)
    with pytest.raises(UserError, match=r"gs://b/\*\.txt needs a package .*pip install gcsfs"):
        texts(files="gs://b/*.txt")


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
    table = pyarrow.table({"body": ["one", "日本", ""], "other": [1, 2, 3]})
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
    """Root may read any file, so the refusal is simulated."""
    (tmp_path / "a.txt").write_text("text")
    (stream,) = find_streams(DataConfig(source="text", files=f"{tmp_path}/a.txt"))

    def refuse(*_: object):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(stream.files[0].path), "open", refuse)
    with pytest.raises(UserError, match=r"a\.txt cannot be read \(Permission denied\)"):
        list(stream.digests())


def test_a_wrong_field_in_a_mixture_names_the_key_of_its_entry(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"body": "a"}\n')
    for name, field, message in (
        ("a.parquet", "text", r"no column 'text': set data\.mixture\.m\.field to one of body, n"),
        ("a.parquet", "n", r"does not hold text \(int64\): set data\.mixture\.m\.field to"),
        ("a.jsonl", "text", r"no text in field 'text' \(missing\): set data\.mixture\.m\.field to"),
    ):
        with pytest.raises(UserError, match=message):
            documents(mixture={"m": {"files": f"{tmp_path}/{name}", "field": field}})


def bombs() -> dict[str, tuple[pyarrow.Table, dict]]:
    """Make tables that take a few KiB as files and hundreds of MiB to GiB as text."""
    text = "word " * (1 << 16)
    column = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 20_000, pyarrow.int32()), pyarrow.array([text])
    )
    zeros = pyarrow.array([b"a" * (1 << 20)] * 100, pyarrow.binary()).cast(pyarrow.string())
    return {
        "one text, again and again": (pyarrow.table({"text": column}), {}),
        "one text, as nothing but its prefix": (
            pyarrow.table({"text": pyarrow.array([text] * 500)}),
            {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
        ),
        "a compressed page": (
            pyarrow.table({"text": zeros}),
            {"compression": "zstd", "use_dictionary": False},
        ),
    }


@pytest.mark.parametrize("name", bombs())
def test_a_file_that_expands_without_bound_is_left(tmp_path, name):
    table, how = bombs()[name]
    path = tmp_path / "bomb.parquet"
    pyarrow.parquet.write_table(table, path, **how)
    assert path.stat().st_size < 1 << 19
    (stream,) = find_streams(DataConfig(files=str(path)))
    read = 0
    with pytest.raises(UserError, match=r"bomb\.parquet expands without bound: its [\d,]+ bytes"):
        for document in stream.documents():
            read += len(document.text)
    assert read <= FREE_BYTES + MAX_RATIO * path.stat().st_size


def test_text_that_repeats_itself_within_the_bound_is_read(tmp_path):
    rows = pyarrow.table({"text": ["the same words " * 100] * 20_000})
    pyarrow.parquet.write_table(rows, tmp_path / "a.parquet", compression="zstd")
    assert len(texts(files=f"{tmp_path}/a.parquet")) == 20_000


def test_a_missing_parquet_column_lists_those_there(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column 'text'.*body, n"):
        documents(source="parquet", files=f"{tmp_path}/a.parquet")
    with pytest.raises(UserError, match="column 'n' does not hold text"):
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
