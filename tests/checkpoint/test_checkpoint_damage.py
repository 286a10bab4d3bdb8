"""Damaged checkpoints are never loaded as weights, and never restart a run from step 0."""

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_trees import abstract, files_of, flip_bit, make_tree, same_bits, saved

from moe_jax.checkpoint import Checkpoints, manifest
from moe_jax.checkpoint.commit import Marked, Renamed
from moe_jax.errors import UserError


def test_a_flipped_bit_in_any_file_is_found(tmp_path):
    saved(tmp_path / "good", 1, 2)
    names = [path.relative_to(tmp_path / "good" / "2") for path in files_of(tmp_path / "good", 2)]
    assert {"_CHECKPOINT_METADATA", "commit_success.txt"} < {str(name) for name in names}
    for number, name in enumerate((*names, Path("manifest.json"))):
        root = Path(shutil.copytree(tmp_path / "good", tmp_path / str(number)))
        checkpoints = Checkpoints(root)
        flip_bit(root / "2" / name)
        reports: list[str] = []
        assert checkpoints.latest_good(reports.append) == 1
        assert len(reports) == 1 and "step 2" in reports[0]
        assert name.name in reports[0] or name.name == "manifest.json"
        assert checkpoints.steps() == [1] and checkpoints.quarantined() == ["2"]
        assert (root / "quarantine" / "2" / name).exists()


@pytest.mark.full
def test_every_single_bit_of_a_manifest_counts(tmp_path):
    """The manifest has no checksum of its own: only its format can show damage."""
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.save(1, {"w": np.arange(3.0)})
    checkpoints.wait()
    path = tmp_path / "1" / "manifest.json"
    good = path.read_bytes()
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        assert checkpoints.verify(1), bit
    path.write_bytes(good)
    assert checkpoints.verify(1) is None


@pytest.mark.parametrize("way", [Renamed, Marked])
def test_a_kill_about_the_commit_costs_no_step(tmp_path, monkeypatch, way):
    """A save is a step only after the commit, also in gs://, which cannot rename."""
    monkeypatch.setattr("moe_jax.checkpoint.store.Renamed", way)
    checkpoints = saved(tmp_path, 1)

    def killed(*_):
        raise OSError("killed")

    for place, name, steps in ((way.__base__, "finalize", [1]), (manifest, "seal", [1, 2])):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="killed"):
            patch.setattr(place, name, killed)
            checkpoints.save(2, make_tree("cube"))
            checkpoints.wait()
        left = (tmp_path / "2" / "manifest.json").exists()
        assert left == (way is Marked or steps == [1, 2])
        checkpoints = Checkpoints(tmp_path)
        assert checkpoints.steps() == steps and checkpoints.latest_good() == steps[-1]
        assert bool(checkpoints.verify(2)) == (steps == [1])


def test_a_cut_file_is_found_and_the_step_can_be_saved_again(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    for copy in range(2):
        damaged = files_of(tmp_path, 2)[0]
        damaged.write_bytes(damaged.read_bytes()[:-7])
        reason = checkpoints.verify(2)
        assert reason and "bytes instead of" in reason and damaged.name in reason
        assert checkpoints.latest_good() == 1
        assert len(checkpoints.quarantined()) == copy + 1
        assert checkpoints.save(2, make_tree("cube", seed=2))
        checkpoints.wait()
        assert checkpoints.latest_good() == 2


def test_what_was_loaded_from_a_bad_step_is_dropped(tmp_path):
    """Orbax loads a flipped bit in the weights without an error; only the hashes detect it."""
    checkpoints = Checkpoints(tmp_path)
    right = {step: np.random.default_rng(step).normal(size=(64, 64)) for step in (1, 2)}
    for step, w in right.items():
        checkpoints.save(step, {"w": w})
    checkpoints.wait()
    flip_bit(max((tmp_path / "2").rglob("d/*"), key=lambda path: path.stat().st_size))
    like = {"w": jax.ShapeDtypeStruct((64, 64), np.float64)}
    assert not same_bits(checkpoints.restore(2, like)["w"], right[2])

    reports: list[str] = []
    step, tree = checkpoints.restore_latest(lambda _: like, reports.append)
    assert step == 1 and same_bits(tree["w"], right[1]) and checkpoints.quarantined() == ["2"]
    assert "step 2 is bad" in reports[0] and "differs" in reports[0] and len(reports) == 2
    line = r"checkpoint of step 1: \d+\.\d MiB loaded in .* s and, in parallel, verified in"
    assert re.match(line, reports[1])


def test_a_good_step_of_another_model_is_refused_and_not_passed_over(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    other = abstract(make_tree("one"))
    other["params"]["scale"] = jax.ShapeDtypeStruct((6,), jnp.float32)
    with pytest.raises(UserError, match=r"/2 holds another .* params/scale is float32\[5\] in the"):
        checkpoints.restore_latest(lambda _: other)
    assert checkpoints.steps() == [1, 2]
    flip_bit(files_of(tmp_path, 2)[0])  # if the step is damaged too, that is reported
    with pytest.raises(UserError, match=r"/1 holds another .* params/scale"):
        checkpoints.restore_latest(lambda _: other)


def test_a_removed_file_is_found(tmp_path):
    checkpoints = saved(tmp_path, 1)
    files_of(tmp_path, 1)[0].unlink()
    assert "missing" in (checkpoints.verify(1) or "")


def test_when_none_is_good_nothing_moves_and_nothing_starts_over(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    for step in (1, 2):
        flip_bit(files_of(tmp_path, step)[0])
    for _ in range(2):
        with pytest.raises(UserError, match=r"No checkpoint under .* verifies .*step 2"):
            checkpoints.latest_good()
    assert checkpoints.steps() == [1, 2] and not checkpoints.quarantined()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"format": 1, "files": {}}',
        '{"format": 9, "files": {"a": {}}}',
        '{"format": 1, "files": {"../1/x": {"size": 1, "sha256": ""}}}',
    ],
)
def test_a_garbled_manifest_is_a_bad_step(tmp_path, text):
    checkpoints = saved(tmp_path, 1)
    (tmp_path / "1" / "manifest.json").write_text(text)
    assert "manifest.json is damaged" in (checkpoints.verify(1) or "")


def test_what_is_not_a_step_is_ignored(tmp_path):
    checkpoints = saved(tmp_path, 1)
    (tmp_path / "7").mkdir()  # an empty numeric directory
    for leftover in ("6.orbax-checkpoint-tmp", "8.orbax-checkpoint-tmp", "0.doomed"):
        shutil.copytree(tmp_path / "1", tmp_path / leftover)
    (tmp_path / "9").mkdir()
    (tmp_path / "9" / "data").write_bytes(b"half a save without a commit marker")
    (tmp_path / "notes.txt").write_text("hello")
    checkpoints = Checkpoints(tmp_path)  # as after a restart
    assert checkpoints.steps() == [1] and checkpoints.latest_good() == 1
    for step in (7, 8, 9):
        assert checkpoints.save(step, make_tree("cube", seed=step))
    checkpoints.wait()
    assert checkpoints.latest_good() == 9 and checkpoints.quarantined() == ["9"]
    assert not [p for p in tmp_path.iterdir() if p.suffix in (".orbax-checkpoint-tmp", ".doomed")]


@pytest.mark.parametrize("marker", ["manifest.json", "commit_success.txt"])
def test_a_step_that_lost_its_marker_is_passed_over(tmp_path, marker):
    checkpoints = saved(tmp_path, 1, 2)
    (tmp_path / "2" / marker).unlink()
    assert checkpoints.latest_good() == 1


def test_a_save_that_cannot_be_written_names_path_and_reason(tmp_path):
    root = tmp_path / "checkpoints"
    root.write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"checkpoints.* cannot be written \(.*(exists|Not a dir)"):
        saved(root, 1)


def test_a_save_that_fails_half_way_leaves_the_older_step(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 1)

    def full(directory):
        raise OSError(28, "No space left on device", str(directory))

    with monkeypatch.context() as patch:
        patch.setattr("moe_jax.checkpoint.manifest.write", full)
        with pytest.raises(UserError, match=r"/2 cannot be written \(No space left on device"):
            checkpoints.save(2, make_tree("cube"))
            checkpoints.wait()
    assert checkpoints.latest_good() == 1
    assert checkpoints.save(2, make_tree("cube"))
    checkpoints.wait()
    assert checkpoints.latest_good() == 2


KILLED = """
import sys
import jax.numpy as jnp
from moe_jax.checkpoint import Checkpoints, manifest
checkpoints = Checkpoints(sys.argv[1])
for step in range(1, 1000):
    checkpoints.save(step, {"params": {"w": jnp.full((1024, 1024), step)}, "step": step})
    if step == 3:
        print("saving", flush=True)
"""


@pytest.mark.parametrize(
    "kill", [0, *(pytest.param(n, marks=pytest.mark.lifecycle) for n in (1, 2))]
)
def test_sigkill_during_saves(tmp_path, cli_env, kill):
    """After a kill at any time, the newest step that is found holds the values of that step."""
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, env=cli_env, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout and run.stdout.readline() == "saving\n"
        # A temporary directory exists: a save is in progress.
        while not any(tmp_path.glob("*.orbax-checkpoint-tmp*")):
            assert run.poll() is None
        run.send_signal(signal.SIGKILL)
    checkpoints = Checkpoints(tmp_path)
    step = checkpoints.latest_good()
    assert step is not None and step >= 2 and not checkpoints.quarantined()
    target = {"params": {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.int32)}, "step": np.int64(0)}
    back = checkpoints.restore(step, target)
    assert int(back["step"]) == step and (np.asarray(back["params"]["w"]) == step).all()
    assert checkpoints.save(step + 1, back)
    checkpoints.wait()
    assert checkpoints.latest_good() == step + 1
    assert not list(tmp_path.glob("*tmp*"))
