"""Garbage in Parquet files, tokenizers and stores, which native code reads.

Arrow, Rust and TensorStore may abort, hang or allocate what a file declares, so a separate process
with a memory limit reads the files (reader_child.py).  The only good outcomes are a value, or one
sentence that names the file.
"""

import io
import json
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import tokenizers
from garbage import changed_bytes, json_file
from hypothesis import strategies as st
from test_hostile_files import SECONDS, fuzz, is_sentence
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from moe_jax.data.build import ChunkSizes, build_store
from moe_jax.data.config import DataConfig
from moe_jax.data.store import array_digests, key_value_store, manifest_bytes
from moe_jax.data.tokenizers import train_bpe

GROWTH = 512 << 20  # bytes that reading a file of a few KiB may take beyond the good ones
CHILD = Path(__file__).with_name("reader_child.py")
SAMPLE = ["the router picks an expert for a token\n" * 20, "größe und 日本\n" * 20]
counts = pytest.mark.parametrize("count", [60, pytest.param(6000, marks=pytest.mark.full)])


class Reader:
    """The reading process; `tally` counts the outcomes of the garbage files."""

    def __init__(self, env: dict[str, str]):
        self.tally = {"ok": 0, "refused": 0}
        self._least = 0
        self._env = env
        self._process = self._start()

    def good(self, kind: str, path: Path) -> None:
        """Read a valid file; its memory is what reading needs."""
        answer = self._ask(kind, path)
        assert answer["outcome"] == "ok", answer
        self._least = max(self._least, answer["held"])

    def bad(self, kind: str, path: Path) -> None:
        """Read garbage; fail if the outcome is neither a value nor a sentence."""
        answer = self._ask(kind, path)
        assert answer["outcome"] in self.tally, answer["message"]
        if answer["message"]:
            is_sentence(answer["message"], path.name)
        assert answer["held"] < self._least + GROWTH, answer
        self.tally[answer["outcome"]] += 1

    def _start(self) -> subprocess.Popen:
        command = [sys.executable, str(CHILD)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self._env, stdin=pipe, stdout=pipe, text=True)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(self, kind: str, path: Path) -> dict:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"read": kind, "path": str(path)}) + "\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], SECONDS)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            self.close()
            how = f"ends with {self._process.returncode}" if ready else "hangs"
            self._process = self._start()
            pytest.fail(f"{path.name}: the reader {how}")
        return json.loads(line)


@pytest.fixture
def reader(cli_env):
    child = Reader(cli_env)
    yield child
    child.close()


def parquets() -> list[bytes]:
    """A table in several encodings, compressions and versions."""
    rows = 300
    columns = {"text": [f"{i} words of text " * (i % 5) for i in range(rows)]}
    table = pyarrow.table(columns | {"n": list(range(rows))})
    nested = pyarrow.table({"text": ["a", None, "b"] * 9, "l": [[1, 2], [], None] * 9})
    found = []
    for more in (
        {"compression": "none", "use_dictionary": False},
        {"compression": "zstd", "row_group_size": 50},
        {"compression": "none", "data_page_version": "2.0", "write_page_checksum": True},
        {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
        {"use_dictionary": False, "column_encoding": {"text": "DELTA_LENGTH_BYTE_ARRAY"}},
        {"compression": "gzip", "store_schema": False, "write_page_index": True},
    ):
        for each in (table, nested):
            file = io.BytesIO()
            pyarrow.parquet.write_table(each, file, **more)
            found.append(file.getvalue())
    return found


@counts
def test_parquet(tmp_path, reader, count):
    path = tmp_path / "a.parquet"
    good = parquets()
    for raw in good:
        path.write_bytes(raw)
        reader.good("parquet", path)

    def check(raw: bytes) -> None:
        path.write_bytes(raw)
        reader.bad("parquet", path)

    fuzz(count, st.sampled_from(good).flatmap(changed_bytes), check)
    assert min(reader.tally.values()) > 0, reader.tally


def tokenizer_files(folder: Path) -> list[dict]:
    """Write a tokenizer.json per model type, with the parts that published ones have."""
    train_bpe(iter(SAMPLE), 280, folder / "bpe.json")
    words = {word: i for i, word in enumerate(["[UNK]", "</s>", "the", "router", "##s", "send"])}
    sequence = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(r"\s+|\d{1,3}"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(use_regex=False),
        ]
    )
    normal = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace("a", "b"), normalizers.Lowercase()]
    )
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("the", -1.5), ("e", -2.0), ("\u2581", -3.0)]
    made = {
        "words": (models.WordLevel(words, "[UNK]"), pre_tokenizers.Whitespace(), None),
        "pieces": (models.WordPiece(words, unk_token="[UNK]"), sequence, normal),
        "unigram": (models.Unigram(pieces, 0, False), pre_tokenizers.Metaspace(), normal),
    }
    for name, (model, pre, normalizer) in made.items():
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = pre
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
        tokenizer.enable_truncation(max_length=9)
        tokenizer.enable_padding(length=9)
        tokenizer.add_special_tokens(["</s>"])
        tokenizer.save(str(folder / f"{name}.json"))
    return [json.loads((folder / f"{name}.json").read_text()) for name in ("bpe", *made)]


@counts
def test_tokenizer_json(tmp_path, reader, count):
    good = tokenizer_files(tmp_path)
    for name in ("bpe", "words", "pieces", "unigram"):
        reader.good("tokenizer", tmp_path / f"{name}.json")
    path = tmp_path / "bad.json"
    # Keep few of the vocabulary's entries, so that changes hit other values as well.
    good[0]["model"]["vocab"] = dict(list(good[0]["model"]["vocab"].items())[:9])
    good[0]["model"]["merges"] = []

    def check(raw: bytes) -> None:
        path.write_bytes(raw)
        reader.bad("tokenizer", path)

    fuzz(count, st.sampled_from(good).flatmap(json_file), check)
    assert min(reader.tally.values()) > 0, reader.tally


@counts
def test_sentencepiece(tmp_path, reader, count):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(SAMPLE).splitlines()),
        model_writer=model,
        vocab_size=320,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path / "a.model"
    path.write_bytes(model.getvalue())
    reader.good("tokenizer", path)

    def check(raw: bytes) -> None:
        path.write_bytes(raw)
        reader.bad("tokenizer", path)

    fuzz(count, changed_bytes(model.getvalue()), check)
    assert min(reader.tally.values()) > 0, reader.tally


@counts
@pytest.mark.parametrize("file", ["manifest.json", "train/tokens/zarr.json"])
def test_store_sealed_by_whoever_changed_it(tmp_path, reader, count, file):
    """The digests are recomputed over the garbage, so they do not reveal it."""
    for name in range(20):
        (tmp_path / f"{name}.txt").write_text(f"{name} words " * 20)
    config = DataConfig(source="text", files=f"{tmp_path}/*.txt", heldout_fraction=0.2)
    good = Path(build_store(config, tmp_path / "stores", layout=ChunkSizes(64, 512)).path)
    reader.good("store", good)
    path = tmp_path / "bad"
    shutil.copytree(good, path)
    manifest = json.loads((good / "manifest.json").read_text())

    def check(raw: bytes) -> None:
        (path / file).write_bytes(raw)
        try:
            found = json.loads((path / "manifest.json").read_bytes()) if "man" in file else manifest
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict):
            if "zarr" in file:
                found = found | {"arrays": array_digests(key_value_store(path))}
            (path / "manifest.json").write_bytes(manifest_bytes(found))
        reader.bad("store", path)

    valid = json.loads((good / file).read_text())
    fuzz(count, json_file(valid), check)
    assert min(reader.tally.values()) > 0, reader.tally
