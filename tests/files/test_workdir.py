"""Workdirs in an object store, through etils and fsspec; a dict stands in for the store."""

import importlib
import json
import os
import threading
from pathlib import Path

import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry, known_implementations
from small_run import small_config, write_corpus

from moe_jax.checkpoint import manifest
from moe_jax.errors import UserError
from moe_jax.files.workdir import BELOW, Mirror, is_remote, locate
from moe_jax.parallel.distributed import Preemption
from moe_jax.record import report
from moe_jax.record.provenance import write_run_record
from moe_jax.record.report import Reporter, has_last_eval
from moe_jax.run.control import STOP_FILE, Control, Stop
from moe_jax.watch.timekeeper import GOODPUT, Timekeeper


class Buckets(MemoryFileSystem):
    """gs:// in memory: objects are written whole and cannot be appended to."""

    protocol = ("gcs", "gs")
    store: dict = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    broken = False
    held = threading.Event()  # writes wait for it
    held.set()

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("gs://").strip("/")

    def _open(self, path, mode="rb", **kwargs):
        assert "a" not in mode and "+" not in mode, "objects cannot be appended to"
        if self.broken:
            raise OSError("503 from the store")
        if "w" in mode:
            self.held.wait(60)
        return super()._open(path, mode, **kwargs)


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setitem(_registry, "gcs", Buckets)
    monkeypatch.setattr(Buckets, "store", {})
    monkeypatch.setattr(Buckets, "pseudo_dirs", [""])
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    yield epath.Path("gs://bucket")
    epath.backend.fsspec_backend._get_filesystem.cache_clear()


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(folder):
    return [row["step"] for row in rows(folder)]


def test_a_step_in_a_bucket_is_one_once_it_has_its_marker(bucket):
    step = bucket / "run" / "checkpoints" / "8"
    for name in ("weights", "_CHECKPOINT_METADATA"):
        (step / name).write_text(name)
    assert not manifest.committed(step)
    manifest.write(step)
    assert not manifest.committed(step)
    (step / manifest.COMMIT).write_text("done")
    assert manifest.committed(step) and manifest.verify(step) is None
    manifest.seal(step)
    assert manifest.verify(step) is None
    assert [path.name for path in step.glob("*.new")] == []
    (step / manifest.COMMIT).write_text("dome")
    assert "commit_success.txt differs" in (manifest.verify(step) or "")
    (step / manifest.COMMIT).unlink()  # lost after the commit: a bad step, not an unfinished save
    assert manifest.committed(step) and manifest.verify(step)


def test_a_run_is_reported_into_a_bucket_and_goes_on_there(bucket):
    workdir = locate("gs://bucket/runs/one")
    with Reporter(workdir, 9, None) as reporter:
        for step in (1, 2, 3):
            reporter.log({"step": step, "loss": 1.0})
    assert steps(workdir) == [1, 2, 3]
    events = [path.name for path in (workdir / "tensorboard").iterdir()]

    # A second process with an empty disk resumes from step 2.
    with Reporter(workdir, 9, 2) as reporter:
        for step in (3, 4):
            reporter.log({"step": step, "loss": 2.0})
        reporter.log({"step": 4, "eval_loss": 2.0})
    assert steps(workdir) == [1, 2, 3, 4, 4]
    assert [row.get("loss") for row in rows(workdir)][2:4] == [2.0, 2.0]
    metrics = workdir / "metrics.jsonl"
    assert has_last_eval(metrics, 4, 0) and not has_last_eval(metrics, 3, 0)
    aside = json.loads((workdir / "metrics.jsonl.1.tail").read_text())
    assert (aside["step"], aside["loss"]) == (3, 1.0)
    now = {path.name for path in (workdir / "tensorboard").iterdir()}
    assert now >= set(events) and events  # named by the second in which they begin

    with Reporter(workdir, 9, 3):
        pass
    assert (workdir / "metrics.jsonl.2.tail").exists()  # the first tail is not overwritten


def test_a_flush_before_a_checkpoint_leaves_nothing_behind(bucket):
    workdir = locate("gs://bucket/one")
    reporter = Reporter(workdir, 9, None)
    reporter.log({"step": 1, "loss": 1.0})
    reporter.log({"step": 2, "loss": 1.0})
    assert steps(workdir) == [1]  # half a minute has not passed
    reporter.flush()
    assert steps(workdir) == [1, 2]
    reporter.close()


def test_a_store_out_of_reach_stops_nothing(bucket, monkeypatch, capsys):
    workdir = locate("gs://bucket/one")
    reporter = Reporter(workdir, 9, None)
    monkeypatch.setattr(Buckets, "broken", True)
    reporter.log({"step": 1, "loss": 1.0})
    reporter.flush()
    assert "503 from the store" in capsys.readouterr().out
    reporter.close()
    said = capsys.readouterr().out
    assert "503 from the store" in said and said.count("\n") == 1
    kept = Path(said.split("remains in ")[1].rstrip(".\n"))
    assert steps(kept) == [1]
    monkeypatch.setattr(Buckets, "broken", False)
    reporter.close()
    assert steps(workdir) == [1] and not kept.exists()


def test_a_store_that_does_not_answer_holds_up_nothing(bucket, monkeypatch, capsys):
    def limit(seconds: float) -> None:
        for name in ("COPY_TIMEOUT", "LAST_COPY_TIMEOUT"):
            monkeypatch.setattr(report, name, seconds)

    workdir, answers = locate("gs://bucket/one"), threading.Event()
    limit(60.0)
    reporter = Reporter(workdir, 9, None)
    reporter.log({"step": 1, "loss": 1.0})
    monkeypatch.setattr(Buckets, "held", answers)
    limit(0.1)
    for step in (2, 3):
        reporter.log({"step": step, "loss": 1.0})
        reporter.flush()
    said = capsys.readouterr().out
    assert said.count("takes longer than 0.1 s. The run continues.") == 1
    reporter.close()
    kept = Path(capsys.readouterr().out.split("kept in ")[1].rstrip(".\n"))
    assert steps(kept) == [1, 2, 3]
    answers.set()
    limit(60.0)
    reporter.close()
    assert steps(workdir) == [1, 2, 3] and not kept.exists()


def test_the_record_and_the_stop_file(bucket, tmp_path):
    workdir = locate("gs://bucket/one")
    write_run_record(str(workdir), "{}\n", {"train.steps": 3}, "abc")
    assert json.loads((workdir / "overrides.json").read_text()) == {"train.steps": 3}

    control = Control(small_config(write_corpus(tmp_path)), workdir, 8)
    preemption = Preemption()
    assert control.after(1, preemption) is Stop.CONTINUE
    (workdir / STOP_FILE).write_text("")
    assert control.after(2, preemption) is Stop.ASKED
    preemption.close()
    assert not (workdir / STOP_FILE).exists()


def test_only_what_changed_is_copied(bucket):
    workdir = locate("gs://bucket/one")
    mirror = Mirror(workdir / "profile")
    (mirror.folder / "plugins").mkdir()
    (mirror.folder / "plugins" / "trace").write_text("a")
    (mirror.folder / "other").write_text("b")
    mirror.push()
    (workdir / "profile" / "other").unlink()
    (mirror.folder / "plugins" / "trace").write_text("longer")
    mirror.close()
    assert (workdir / "profile" / "plugins" / "trace").read_text() == "longer"
    assert not (workdir / "profile" / "other").exists()
    assert not mirror.folder.exists()


def test_a_local_folder_is_written_in_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("runs/x") == tmp_path / "runs" / "x" and not is_remote("runs/x")
    assert Mirror(tmp_path / "x").folder == tmp_path / "x"
    with Reporter(tmp_path / "x", 9, None) as reporter:
        reporter.log({"step": 1, "loss": 1.0})
        assert steps(tmp_path / "x") == [1]


@pytest.mark.parametrize("url", ["s3://bucket/run", "hf://a/b", "http://x.y/run", "file:///run"])
def test_a_url_of_another_scheme_is_no_workdir(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--workdir is '.*': \w+:// is not supported"):
        locate(url)
    assert list(tmp_path.iterdir()) == []


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/runs/x") == tmp_path / "runs" / "x"


def deep(folder: Path, size: int) -> Path:
    """A path of `size` bytes below `folder` whose names are within the limit."""
    whole, rest = divmod(size - len(os.fsencode(folder)), 201)
    half = (199 + rest) // 2
    return folder.joinpath(*["y" * 200] * (whole - 1), "z" * half, "z" * (199 + rest - half))


def test_a_workdir_with_names_too_long(tmp_path):
    """A workdir is accepted only if the longest path of a run, in quarantine too, fits below it."""
    limit = os.pathconf(tmp_path, "PC_PATH_MAX")
    for name in ("x" * 256, "ü" * 128, f"{'x' * 256}/run"):
        with pytest.raises(UserError, match="contains a name of 256 bytes"):
            locate(str(tmp_path / name))
    locate(str(tmp_path / ("x" * 255)))
    for size in (limit - BELOW + 1, limit, 3 * limit):
        path = deep(tmp_path, size)
        assert len(os.fsencode(path)) == size
        with pytest.raises(UserError, match=f"is a path of {size} bytes"):
            locate(str(path))
    fits = locate(str(deep(tmp_path, limit - BELOW)))
    (fits / "checkpoints" / "quarantine" / "123456789.12" / "ocdbt.process_1234").mkdir(
        parents=True
    )
    (fits / "profile" / "plugins" / "profile" / "2026_12_01_03_13_25").mkdir(parents=True)
    Path(fits, "profile/plugins/profile/2026_12_01_03_13_25", f"{'h' * 64}.xplane.pb").touch()
    aside = Path(fits, "checkpoints/123456789.orbax-checkpoint-tmp/ocdbt.process_1234/d")
    aside.mkdir(parents=True)
    (aside / f"{'a' * 32}.__lock").touch()


@pytest.mark.parametrize("command", ["checkpoint", "results", "goodput", "ledger", "replay"])
def test_commands_that_read_a_workdir_with_names_too_long(tmp_path, command):
    module = importlib.import_module(f"moe_jax.cli.{command}")
    more = ["--step=1"] if command == "replay" else []
    with pytest.raises(UserError):
        module.main([command, f"--workdir={tmp_path / ('x' * 256)}", *more])


def test_a_store_that_cannot_be_used_is_one_sentence(bucket, monkeypatch):
    def refuse(self, path, **kwargs):
        raise OSError("Forbidden: no access\nto bucket")

    monkeypatch.setattr(Buckets, "exists", refuse)
    with pytest.raises(
        UserError, match=r"gs://bucket/one cannot be reached \(Forbidden: no access"
    ):
        locate("gs://bucket/one")
    monkeypatch.delitem(_registry, "gcs")
    monkeypatch.setitem(known_implementations, "gcs", {"class": "nowhere.X"})
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    with pytest.raises(UserError, match="pip install gcsfs"):
        locate("gs://bucket/one")


def test_every_attempt_adds_to_one_object(bucket):
    workdir = locate("gs://bucket/runs/one")
    for step in (0, 4):
        with Timekeeper(workdir, True) as keeper:
            keeper.resumed(step)
            keeper.ended(42)
    found = [json.loads(line) for line in (workdir / GOODPUT).read_text().splitlines()]
    assert [row["from"] for row in found if row.get("end") == 42] == [0, 4]
