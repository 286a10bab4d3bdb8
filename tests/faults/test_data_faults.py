"""Data faults, checks 14 to 18: each is found and named, and no example is lost or repeated."""

import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from garbage import corpus_with_a_bad_record
from jax.sharding import SingleDeviceSharding
from small_run import flags, small_config, write_corpus

from moe_jax.cli.train import main
from moe_jax.config import to_json
from moe_jax.data.build import ChunkSizes, build_store
from moe_jax.data.config import DataConfig
from moe_jax.data.feed import DeviceFeed
from moe_jax.data.pipeline import Batches, HeldOut
from moe_jax.data.store import array_digests, key_value_store, manifest_bytes, open_store
from moe_jax.data.tokenizers import train_bpe
from moe_jax.errors import UserError
from moe_jax.record.provenance import write_run_record
from moe_jax.run.resume import data_record
from moe_jax.run.setup import prepare

LAYOUT = ChunkSizes(64, 512)
T = 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> DataConfig:
    files = write_corpus(tmp_path_factory.mktemp("corpus"), 24)
    return DataConfig(source="text", files=files, heldout_fraction=0.2)


@pytest.fixture
def store(corpus, tmp_path) -> Path:
    """The folder of a store with several shards per split."""
    return Path(build_store(corpus, tmp_path / "stores", layout=LAYOUT).path)


@pytest.fixture(autouse=True)
def sigterm():
    """Restore the SIGTERM handler, which the trainer replaces for its whole process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def read_all(path: Path) -> None:
    store = open_store(path)
    for split in (store.train, store.heldout):
        split.read([(0, split.num_tokens)])


# ---- 15: a run is resumed with another seed, mixture, tokenizer or text


def mixture(folder: Path, weight: float = 2.0) -> dict[str, dict]:
    return {
        "prose": {"files": f"{folder}/prose/*.txt", "weight": weight},
        "web": {"files": f"{folder}/web/*.txt"},
    }


def test_a_run_goes_on_with_its_own_data_only(tmp_path):
    """A changed weight, mixture entry, file or tokenizer is refused; moved files are not."""
    for name in ("prose", "web"):
        write_corpus(tmp_path / name, 24)
    tokenizer = tmp_path / "tokenizer.json"
    train_bpe(["the model reads a small text"] * 9, 262, tokenizer)

    def ready(**overrides: object):
        given = {"data.mixture": mixture(tmp_path), "data.tokenizer": str(tokenizer)} | overrides
        config = small_config("", **given, **{"data.store": str(tmp_path / "stores")})
        return prepare(config, tmp_path / "run", lambda line: None, jax.devices())

    run = ready()
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    text = data_record(run.store)
    write_run_record(str(run.workdir), to_json(run.config), {}, run.store.fingerprint, text)
    ready()  # the control
    moved = tmp_path / "moved"
    for name in ("prose", "web"):
        shutil.copytree(tmp_path / name, moved / name)
    shutil.copy(tokenizer, moved)
    elsewhere = {"data.mixture": mixture(moved), "data.tokenizer": str(moved / tokenizer.name)}
    assert ready(**elsewhere).store.fingerprint == run.store.fingerprint

    for number, file in enumerate(sorted((moved / "web").iterdir())):
        file.rename(file.with_name(f"renamed_{number:03}.txt"))
    renamed = ready(**elsewhere).store
    assert renamed.content == run.store.content

    def refused(pattern: str, **overrides: object) -> None:
        with pytest.raises(UserError, match=pattern):
            ready(**overrides)

    refused(r"config\.seed is 5 but the run in this workdir has 0", seed=5)
    key = r"config\.data\.mixture"
    for other, pattern in (
        (mixture(tmp_path, 3.0), rf"{key}\.prose\.weight is 3\.0 but the run .* has 2\.0"),
        ({"prose": mixture(tmp_path)["prose"]}, rf"{key}\.web\.field is not set but the run"),
    ):
        refused(pattern, **{"data.mixture": other})
    refused(r"data\.json there: data\.tokenizer differs", **{"data.tokenizer": "bytes"})
    for path in (tmp_path / "web" / "003.txt", tokenizer):
        good = path.read_bytes()
        path.write_bytes(good + b"\n")
        refused(r"text or the tokenizer of the run in .*run has changed .*data\.json")
        path.write_bytes(good)
    ready()


# ---- 16: one record


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("jsonl", r"b\.jsonl line 42 is not JSON \(Expecting ',' delimiter"),
        ("parquet", r"b\.parquet, row group 2, cannot be read after row 100 \(.*CRC"),
    ],
)
def test_a_bad_record_stops_the_run_before_it_begins(tmp_path, kind, place):
    files = corpus_with_a_bad_record(tmp_path / "text", kind)
    with pytest.raises(UserError, match=place):
        main(["train", *flags(tmp_path / "run", files, data__source=kind)])
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "stores").rglob("manifest.json"))


def resealed(path: Path, changed: dict[str, bytes], **keys: object) -> None:
    """Change files of a store and recompute its digests, so that only their content is wrong."""
    for name, raw in changed.items():
        (path / name).write_bytes(raw)
    manifest = json.loads((path / "manifest.json").read_text()) | keys
    manifest["arrays"] = array_digests(key_value_store(path))
    (path / "manifest.json").write_bytes(manifest_bytes(manifest))


def test_a_store_of_another_dtype(store):
    name = "train/tokens/zarr.json"
    raw = (store / name).read_bytes()
    for dtype in ("float32", "int64", "int8"):
        resealed(store, {name: raw.replace(b"uint16", dtype.encode())})
        with pytest.raises(UserError, match=rf"train/tokens holds {dtype}.* instead of uint16"):
            open_store(store)


def test_a_token_id_beyond_the_vocabulary(store):
    """An embedding lookup would silently clamp the id to the last row."""
    resealed(store, {}, vocab_size=257, pad_id=0)
    read_all(store)  # 256 is the largest id in the store
    resealed(store, {}, vocab_size=256, eos_id=0)
    opened = open_store(store)
    (tokens,) = open_store(store).train.read([(0, 10)])
    first = int(opened.train.documents[1, 0]) - 1
    with pytest.raises(UserError, match=rf"train: token {first} has id 256, beyond"):
        opened.train.read([(0, len(tokens)), (first - 5, first + 5)])
    batches = Batches.for_training(opened, 0, opened.train.num_tokens // T, T)
    with pytest.raises(UserError, match="has id 256, beyond its vocabulary of 256"):
        batches.rows(0, np.arange(batches.batch_size))


# ---- 17: too little text


def test_data_never_ends(store):
    """Streams repeat without end; each epoch has its own order."""
    batches = Batches.for_training(open_store(store), 0, 7, T)
    epoch = batches.rows_per_epoch
    far = 10**6 * epoch // 7
    ids = np.concatenate([batches.window_ids(far + i, np.arange(7)) for i in range(epoch)])
    whole = ids[-(far * 7) % epoch :]
    for start in range(0, len(whole) - epoch, epoch):
        assert sorted(whole[start : start + epoch]) == list(range(epoch))


def test_held_out_text_of_less_than_a_batch(store):
    opened = open_store(store)
    windows = -(-(opened.heldout.num_tokens - 1) // T)
    held = HeldOut(opened, 2 * windows, T)
    batch = held.rows(0, np.arange(2 * windows))
    assert len(held) == 1
    assert batch.loss_mask_BT.sum() == opened.heldout.num_tokens - 1
    assert not batch.loss_mask_BT[windows:].any() and not batch.segments_BT[windows:].any()


# ---- 18, and damaged stores


def test_another_tokenizer_never_goes_on_with_a_build(corpus, tmp_path):
    """A build stops half way; with a new tokenizer file at the same path it is another store."""
    tokenizer = tmp_path / "tokenizer.json"
    config = DataConfig(**{**vars(corpus), "tokenizer": str(tokenizer)})

    def stop(line: str) -> None:
        raise InterruptedError if "512 tokens" in line else None

    train_bpe(["the model reads"] * 9, 262, tokenizer)
    with pytest.raises(InterruptedError):
        build_store(config, tmp_path / "stores", lambda line: "512" in line and stop(line), LAYOUT)
    (half,) = (path for path in (tmp_path / "stores").iterdir() if path.is_dir())
    assert list(half.rglob("parts/*"))
    train_bpe(["the word follows"] * 9, 262, tokenizer)
    found = Path(build_store(config, tmp_path / "stores", layout=LAYOUT).path)
    fresh = Path(build_store(config, tmp_path / "fresh", layout=LAYOUT).path)
    assert found.name == fresh.name != half.name
    names = sorted(str(path.relative_to(fresh)) for path in fresh.rglob("*") if path.is_file())
    assert all((found / name).read_bytes() == (fresh / name).read_bytes() for name in names)


@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_a_damaged_journal_costs_the_build_time_and_nothing_else(corpus, tmp_path, store, damage):
    class StopError(Exception):
        pass

    def stop(line: str) -> None:
        if "1,536 tokens" in line:
            raise StopError

    with pytest.raises(StopError):
        build_store(corpus, tmp_path / "again", stop, LAYOUT)
    path = tmp_path / "again" / store.name / "train" / "parts" / "00000001"
    raw = bytearray(path.read_bytes())
    raw[40] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(raw if damage == "bit" else raw[:-24])
    lines: list[str] = []
    again = Path(build_store(corpus, tmp_path / "again", lines.append, LAYOUT).path)
    assert "train: resuming after 512 tokens" in lines
    for file in (path for path in store.rglob("*") if path.is_file()):
        assert (again / file.relative_to(store)).read_bytes() == file.read_bytes()


def named(path: Path, store: Path) -> str:
    """The name of a store's file in error messages: relative to the store."""
    return os.fspath(path.relative_to(store))


@pytest.mark.parametrize("flips", [3, pytest.param(400, marks=pytest.mark.full)])
def test_a_flipped_bit_in_any_file_of_a_store(tmp_path, flips):
    """The long form flips hundreds of bits in each file."""
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text(f"{name} few words" * 5)
    corpus = DataConfig(source="text", files=f"{tmp_path}/*.txt", heldout_fraction=0.2)
    store = Path(build_store(corpus, tmp_path / "stores", layout=ChunkSizes(32, 128)).path)
    read_all(store)
    files = sorted(path for path in store.rglob("*") if path.is_file())
    assert len(files) == 10
    for path in files:
        good = path.read_bytes()
        for place in range(7, 8 * len(good), max(1, 8 * len(good) // flips)):
            raw = bytearray(good)
            raw[place // 8] ^= 1 << place % 8
            path.write_bytes(raw)
            with pytest.raises(UserError, match=r": delete .*, and the next run") as error:
                read_all(store)
            assert named(path, store) in str(error.value)
        path.write_bytes(good)
    read_all(store)


def test_any_file_of_a_store_deleted_or_cut(store):
    for path in sorted(path for path in store.rglob("*") if path.is_file()):
        good = path.read_bytes()
        path.write_bytes(good[:-1])
        with pytest.raises(UserError) as error:
            read_all(store)
        assert named(path, store) in str(error.value)
        path.unlink()
        finished = "holds no finished store" if path.name == "manifest.json" else "delete "
        with pytest.raises(UserError, match=finished) as error:
            read_all(store)
        assert path.name == "manifest.json" or named(path, store) in str(error.value)
        path.write_bytes(good)
    read_all(store)


def test_the_step_gets_what_the_reading_thread_ran_into(store):
    one = SingleDeviceSharding(jax.devices()[0])
    batches = Batches.for_training(open_store(store), 0, 8, T)
    for path in (store / "train" / "tokens" / "c").iterdir():
        path.unlink()
    with (
        DeviceFeed(batches.rows, (1, 8, T), (one, one), 0) as feed,
        pytest.raises(UserError, match=r"train/tokens/c/\d.* is missing"),
    ):
        next(feed)
