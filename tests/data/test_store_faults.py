"""Checks that a store that cannot be written or read gives one sentence, and loses nothing."""

import contextlib
import dataclasses
import errno
import json
from pathlib import Path

import pytest

from moe_jax.data import build, split_writer
from moe_jax.data.build import ChunkSizes, build_store, open_built_store, store_root
from moe_jax.data.store import array_digests, key_value_store, manifest_bytes, open_store
from moe_jax.errors import UserError

SMALL = ChunkSizes(chunk=64, shard=512)


def contents(store_path: str | Path) -> dict[str, bytes]:
    """Read every file under a store."""
    root = Path(store_path)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_a_full_disk_is_one_sentence_and_costs_nothing_that_is_whole(
    config, store, tmp_path, monkeypatch
):
    """Each write fails in turn, from the first array to the manifest."""
    whole, real, calls = contents(store.path), split_writer.writing, []

    @contextlib.contextmanager
    def full(path, fails):
        with real(path):
            calls.append(path)
            if len(calls) == fails:
                raise ValueError("RESOURCE_EXHAUSTED: No space left on device [source locations]")
            yield

    def patch(writing):
        for module in (build, split_writer):
            monkeypatch.setattr(module, "writing", writing)

    patch(lambda path: full(path, 0))
    build_store(config, tmp_path / "count", layout=SMALL)
    for fails in {1, 2, 3, len(calls) // 2, len(calls) - 1, len(calls)}:
        root = tmp_path / f"{fails}"
        calls.clear()
        patch(lambda path, fails=fails: full(path, fails))
        with pytest.raises(UserError, match=r"cannot be written \(RESOURCE_EXHAUSTED") as error:
            build_store(config, root, layout=SMALL)
        assert "make room" in str(error.value) and "\n" not in str(error.value)
        parts = contents(root)
        lines: list[str] = []
        patch(real)
        again = build_store(config, root, lines.append, SMALL)
        assert contents(again.path) == whole
        assert any("resuming after" in line for line in lines) == any("parts/" in p for p in parts)


def test_arrays_are_refused_that_hold_more_than_lies_on_the_disk(store):
    """An untrusted store may have a valid seal and chunks compressed a thousand to one."""
    path = Path(store.path)
    for name, where in (
        ("train/tokens", ("codecs", 0, "configuration", "codecs")),
        ("heldout/documents", ("codecs",)),
    ):
        good = contents(path)
        array = json.loads(good[f"{name}/zarr.json"])
        codecs = array
        for key in where:
            codecs = codecs[key]
        codecs.insert(1, {"name": "gzip", "configuration": {"level": 5}})
        (path / name / "zarr.json").write_text(json.dumps(array))
        manifest = json.loads(good["manifest.json"])
        manifest["arrays"] = array_digests(key_value_store(path))
        (path / "manifest.json").write_bytes(manifest_bytes(manifest))
        with pytest.raises(UserError, match=f"{name} has codecs bytes, gzip, crc32c, which no st"):
            open_store(path)
        for file in (f"{name}/zarr.json", "manifest.json"):
            (path / file).write_bytes(good[file])
    open_store(path)


@pytest.mark.parametrize("url", ["s3://bucket/stores", "hf://a/b", "http://x.y/stores"])
def test_a_store_url_makes_no_local_folder(config, tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for ask in (
        lambda: build_store(config, url),
        lambda: open_built_store(config, url),
        lambda: store_root(dataclasses.replace(config, store=url), "runs/a"),
    ):
        with pytest.raises(UserError, match=r"data\.store is '.*:// is not supported"):
            ask()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_system_without_locks_is_one_sentence(config, tmp_path, monkeypatch):
    def refuse(*_: object):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(UserError, match=r"\.lock cannot be locked \(Operation not supported\)"):
        build_store(config, tmp_path / "s", layout=SMALL)
