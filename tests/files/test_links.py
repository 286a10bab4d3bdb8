"""A workdir, a store or a checkpoint cannot make the program write or delete elsewhere."""

import json
import os
import re
from pathlib import Path

import pytest
from checkpoint_trees import make_tree, saved
from small_run import flags, write_corpus

from launch.sweep import _write_record
from moe_jax.cli.train import main
from moe_jax.data.build import ChunkSizes, build_store
from moe_jax.data.config import DataConfig
from moe_jax.errors import UserError
from moe_jax.files.links import check_links
from moe_jax.files.workdir import locate
from moe_jax.record.report import Reporter
from moe_jax.tools.results.read import read_runs
from moe_jax.watch.timekeeper import Timekeeper


@pytest.fixture
def mine(tmp_path) -> Path:
    """A folder outside the workdir that must not change."""
    folder = tmp_path / "mine"
    (folder / "deep").mkdir(parents=True)
    for name in ("file", "deep/file", "7"):
        (folder / name).write_text("mine")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "name",
    [
        *("lock", "metrics.jsonl", "metrics.jsonl.new", "config.json.new", "samples.txt"),
        *("checkpoints", "tensorboard", "profile/plugins", "checkpoints/quarantine"),
    ],
)
@pytest.mark.parametrize("target", ["file", "deep", "not there yet"])
def test_a_run_writes_through_no_link_out_of_its_workdir(tmp_path, mine, name, target):
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(mine / target)
    before = contents(mine)
    with pytest.raises(UserError, match=rf"{re.escape(str(link))} is a link to .*{target}"):
        main(["train", *flags(tmp_path / "run", write_corpus(tmp_path / "text", 4))])
    assert contents(mine) == before and os.listdir(tmp_path / "run") == [name.split("/")[0]]


def test_a_backup_by_hard_links_stays_as_it_is(tmp_path, mine):
    """After `cp -al` the files have two names; the run must append only under its own."""
    run = tmp_path / "run"
    run.mkdir()
    rows = b'{"step": 1, "loss": 1.0}\n'
    for name in ("metrics.jsonl", "ledger.jsonl", "goodput.jsonl"):
        (mine / name).write_bytes(rows)
        (run / name).hardlink_to(mine / name)
    before = contents(mine)
    with Reporter(run, 9, 1) as reporter, Timekeeper(run, True) as timekeeper:
        reporter.log({"step": 2, "loss": 1.0})
        reporter.ledger({"step": 2})
        timekeeper.resumed(1)
        timekeeper.ended(0)
    assert contents(mine) == before
    for name in ("metrics.jsonl", "ledger.jsonl", "goodput.jsonl"):
        assert (run / name).read_bytes().startswith(rows)
        assert len((run / name).read_bytes()) > len(rows)
    assert not list(run.glob("*.own"))


def test_links_inside_a_workdir_and_to_it_are_fine(tmp_path):
    (tmp_path / "disk" / "run" / "wandb").mkdir(parents=True)
    (tmp_path / "disk" / "run" / "wandb" / "latest").symlink_to("../wandb")
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "run")
    locate(str(tmp_path / "run"))
    check_links(tmp_path / "no such folder")
    (tmp_path / "run" / "up").symlink_to(
        "../../run"
    )  # a cycle: the link points to the workdir itself
    locate(str(tmp_path / "run"))


@pytest.mark.parametrize("name", ["train/tokens", "train/parts", "heldout", "manifest.json", "."])
def test_a_build_writes_and_deletes_through_no_link(tmp_path, mine, name):
    """TensorStore follows links: recreating an array deletes everything behind the link."""
    config = DataConfig(source="text", files=write_corpus(tmp_path / "text", 12))
    good = Path(build_store(config, tmp_path / "good", layout=ChunkSizes(64, 512)).path)
    link = tmp_path / "stores" / good.name / name
    link.parent.mkdir(parents=True)
    if name == ".":
        link.symlink_to(mine)
    else:
        link.symlink_to(mine / ("file" if "json" in name else "."))
    before = contents(mine)
    with pytest.raises(UserError):
        build_store(config, tmp_path / "stores", layout=ChunkSizes(64, 512))
    assert contents(mine) == before


def test_a_build_locks_no_file_of_another(tmp_path, mine):
    config = DataConfig(source="text", files=write_corpus(tmp_path / "text", 12))
    name = Path(build_store(config, tmp_path / "good").path).name
    (tmp_path / "stores").mkdir()
    (tmp_path / "stores" / f"{name}.lock").symlink_to(mine / "file")
    with pytest.raises(UserError, match="cannot be written"):
        build_store(config, tmp_path / "stores")
    assert (mine / "file").read_text() == "mine"


def test_a_sweep_writes_through_no_link(tmp_path, mine):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").symlink_to(mine / "file")
    with pytest.raises(UserError, match=r"sweep\.json is a link to"):
        _write_record(tmp_path / "sweep", {})
    assert (mine / "file").read_text() == "mine"


def test_retention_removes_a_linked_step_and_not_what_it_leads_to(tmp_path):
    """Also for the links that a kill leaves between the rename and the removal of a step."""
    saved(tmp_path / "other", 1, 2, 3)
    before = contents(tmp_path / "other")
    root = tmp_path / "run"
    root.mkdir()
    for step in (1, 2):
        (root / str(step)).symlink_to(tmp_path / "other" / str(step))
    (root / "0.doomed").symlink_to(tmp_path / "other" / "3")
    (root / "3.orbax-checkpoint-tmp").symlink_to(tmp_path / "other" / "3")
    (root / "notes.doomed").write_text("not ours")
    checkpoints = saved(root, 5, 6, keep_last=1)
    assert checkpoints.steps() == [6] and contents(tmp_path / "other") == before
    assert sorted(os.listdir(root)) == ["6", "notes.doomed"]


def test_a_bad_linked_step_is_set_aside_as_a_link(tmp_path):
    saved(tmp_path / "other", 9)
    (tmp_path / "other" / "9" / "commit_success.txt").unlink()
    before = contents(tmp_path / "other")
    checkpoints = saved(tmp_path / "run", 5)
    (tmp_path / "run" / "9").symlink_to(tmp_path / "other" / "9")
    assert checkpoints.latest_good() == 5 and checkpoints.quarantined() == ["9"]
    assert checkpoints.save(9, make_tree("cube"))
    checkpoints.wait()
    assert checkpoints.steps() == [5, 9] and contents(tmp_path / "other") == before


def test_links_that_lead_round_do_not_trap_the_size_of_a_step(tmp_path):
    checkpoints = saved(tmp_path, 1)
    size = checkpoints.size(1)
    for name in ("a", "b"):
        (tmp_path / "1" / name).symlink_to(tmp_path / "1")
    assert checkpoints.size(1) - size < 2 * 4096 * 2


@pytest.mark.parametrize("name", ["../mine", "/etc", "a/b", "..", "~", "a\\b", "a\0", ""])
def test_a_sweep_names_runs_of_its_own_folder_alone(tmp_path, mine, name):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({name: {}, "good-run": {}}))
    assert [run.name for run in read_runs(tmp_path / "sweep")] == ["good-run"]


@pytest.mark.parametrize("name", ["../2/x", "/etc/hostname", "a/../../x", "a\\b", "a\0b", "\ud800"])
def test_a_manifest_names_files_of_its_own_step_alone(tmp_path, name):
    checkpoints = saved(tmp_path, 1)
    path = tmp_path / "1" / "manifest.json"
    found = json.loads(path.read_text())
    found["files"][name] = {"size": 9, "sha256": "0" * 64}
    path.write_text(json.dumps(found))
    reason = checkpoints.verify(1)
    assert reason and reason.isprintable()
    assert reason.startswith("manifest.json is damaged: ") or reason.endswith("is missing")
