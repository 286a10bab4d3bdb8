"""Hostile steps with valid manifests: one-sentence errors, without large allocations or waits."""

import json
import os
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
from etils import epath
from garbage import json_file
from test_hostile_files import COUNTS, fuzz, refused_or_fine

from moe_jax.checkpoint import Checkpoints, declared, manifest
from moe_jax.cli import checkpoint as command
from moe_jax.errors import UserError
from moe_jax.pretrained.weights import newest_good_step

ARRAY = ".zarray"
GOOD = {
    "chunks": [4, 4],
    "compressor": None,
    "dimension_separator": ".",
    "dtype": "<f4",
    "fill_value": None,
    "filters": None,
    "order": "C",
    "shape": [4, 4],
    "zarr_format": 2,
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("good")
    checkpoints = Checkpoints(workdir / "checkpoints")
    tree = {"w": np.arange(16, dtype=np.float32).reshape(4, 4), "b": np.ones(3, np.float32)}
    checkpoints.save(1, {"params": tree, "step": np.int32(1)})
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(tmp_path, good) -> Path:
    shutil.copytree(good, tmp_path / "run")
    return tmp_path / "run"


def step_of(workdir: Path) -> Path:
    return workdir / "checkpoints" / "1"


def arrays(step: Path, **config: object) -> ts.KvStore:
    base = {"driver": "file", "path": f"{step}/"}
    return ts.KvStore.open({"driver": "ocdbt", "base": base, **config}).result()


def seal(step: Path) -> None:
    (step / "manifest.json").unlink(missing_ok=True)
    manifest.write(epath.Path(step))
    manifest.seal(epath.Path(step))


def verdict(workdir: Path, capsys) -> str:
    """The output of `checkpoint --verify` for step 1; fails if it takes much memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code = command.main(["checkpoint", f"--workdir={workdir}", "--verify"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB
    (line,) = capsys.readouterr().out.splitlines()
    assert code == (0 if line.startswith("step 1  ok") else 1)
    return line


def refused(workdir: Path, capsys, why: str) -> None:
    line = verdict(workdir, capsys)
    assert line.startswith("step 1  bad: ") and why in line, line


def test_a_good_step_is_taken(workdir, capsys):
    assert verdict(workdir, capsys).startswith("step 1  ok")
    (step_of(workdir) / ".nfs0001").write_text("of a file system")
    (step_of(workdir) / "notes").write_text("of a person")
    assert verdict(workdir, capsys).startswith("step 1  ok")


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"shape": [2**40]}, "has shape"),
        ({"shape": [2**40, 2**40]}, "declare"),
        ({"shape": [2**40], "chunks": [1]}, "declare"),
        ({"shape": [1], "chunks": [2**40]}, "declare"),
        ({"chunks": [4, 2**30]}, "declare"),
        ({"shape": [2**60, 4]}, "malformed"),
        ({"shape": [True, 4]}, "malformed"),
        ({"shape": [-4, 4]}, "malformed"),
        ({"shape": [1] * 33, "chunks": [1] * 33}, "malformed"),
        ({"chunks": [0, 4]}, "has shape"),
        ({"dtype": "|V1073741824"}, "declare"),
        ({"dtype": [["a", "<f4"]]}, "malformed"),
        ({"dtype": "no type"}, "malformed"),
        ({"compressor": {"id": "zlib", "level": 9}}, "is compressed"),
        ({"compressor": {"id": "blosc"}, "shape": [2**28]}, "is compressed"),
        ({"filters": [{"id": "delta"}]}, "is compressed"),
    ],
)
def test_arrays_that_do_not_fit_their_files(workdir, capsys, changed, why):
    step = step_of(workdir)
    arrays(step).write(f"params.w/{ARRAY}", json.dumps(GOOD | changed)).result()
    seal(step)
    refused(workdir, capsys, why)


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        (f"params.w/{ARRAY}", b"{", "JSONDecodeError"),
        (f"params.w/{ARRAY}", b"[" * 100_000, "RecursionError"),
        (f"params.w/{ARRAY}", b"[]", "AttributeError"),
        ("params.w/zarr.json", b"{}", "zarr 3"),
        (f"extra/{ARRAY}", json.dumps(GOOD | {"shape": [2**40, 4]}).encode(), "declare"),
    ],
)
def test_metadata_of_other_kinds(workdir, capsys, key, value, why):
    step = step_of(workdir)
    arrays(step).write(key, value).result()
    seal(step)
    refused(workdir, capsys, why)


def test_files_without_arrays(workdir, capsys):
    step = step_of(workdir)
    with (step / "d" / "large").open("wb") as file:
        file.truncate(2**27)
    seal(step)
    refused(workdir, capsys, "declare only")
    assert newest_good_step(Checkpoints(workdir / "checkpoints")) is None  # for --init_from
    (step / "d" / "large").unlink()
    (step / "manifest.ocdbt").unlink()
    seal(step)
    refused(workdir, capsys, "manifest.ocdbt is missing")


def test_an_index_that_decompresses_without_bound(workdir, capsys, monkeypatch):
    """Values stored in the nodes of the index, which are compressed 1000 to 1."""
    config = {"max_inline_value_bytes": 2**20, "max_decoded_node_bytes": 2**30}
    step = step_of(workdir)
    shutil.rmtree(step / "d")
    (step / "manifest.ocdbt").unlink()
    store = arrays(step, config=config)
    with ts.Transaction() as transaction:
        for number in range(400):
            store.with_transaction(transaction)[f"{number}"] = bytes(2**20)
    seal(step)
    assert sum(path.stat().st_size for path in step.rglob("*")) < 2**20
    monkeypatch.setattr(declared, "MEMORY", 2**28)
    refused(workdir, capsys, "its metadata cannot be read")


def test_an_index_that_is_not_read_in_time(workdir, capsys, monkeypatch, tmp_path):
    (tmp_path / "hangs.py").write_text("import signal\nsignal.pause()\n")
    monkeypatch.setattr(declared, "_READER", tmp_path / "hangs.py")
    monkeypatch.setattr(declared, "TIMEOUT", 0.2)
    refused(workdir, capsys, "cannot be read within 0.2 s")


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


@pytest.mark.parametrize(
    "name", ["_METADATA", "d", "manifest.ocdbt", "manifest.json", "d/new", "new"]
)
@pytest.mark.parametrize(
    "make", [os.mkfifo, link("/dev/zero"), link("/etc/passwd"), link("."), link("nowhere")]
)
def test_what_is_no_file_is_not_opened(workdir, capsys, name, make):
    path = step_of(workdir) / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    make(path)
    refused(workdir, capsys, f"{name} is a link, a pipe or a device")


@pytest.mark.parametrize(
    "name", ["d/new", "ocdbt.process_7/d/new", "_sharding", "array_metadatas/p"]
)
def test_a_file_that_orbax_would_read_and_the_manifest_does_not_list(workdir, capsys, name):
    path = step_of(workdir) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("new")
    refused(workdir, capsys, f"{name} is not in manifest.json")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's threads
@COUNTS
def test_the_tree_of_a_checkpoint(workdir, count):
    """Damaged files that Orbax parses, with a manifest that lists them as they are."""
    path = step_of(workdir) / "_METADATA"
    tree = json.loads(path.read_text())
    checkpoints = Checkpoints(workdir / "checkpoints")

    def check(raw: bytes) -> None:
        path.write_bytes(raw)
        refused_or_fine(lambda: checkpoints.digest(1), "checkpoints")

    fuzz(count, json_file(tree), check)


def test_reading_has_a_time_limit(workdir, capsys, monkeypatch):
    monkeypatch.setattr(manifest, "seconds_to_read", lambda size: -1.0)
    refused(workdir, capsys, "slower than 1 MiB/s")
    monkeypatch.setattr(command, "seconds_to_read", lambda size: 0.1)
    held = threading.Event()
    monkeypatch.setattr(Checkpoints, "examine", lambda *_: held.wait(30) and None)
    with pytest.raises(UserError, match=r"Step 1 \(.* MiB\) was not read within"):
        command.main(["checkpoint", f"--workdir={workdir}", "--verify"])
    held.set()
