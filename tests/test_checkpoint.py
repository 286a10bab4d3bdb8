"""Checkpoints: what is written comes back, and damage never passes for weights."""

import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.checkpoint import Checkpoints, array_digest, check_disk, disk_needed, named_leaves
from moe_jax.checkpoint.__main__ import main
from moe_jax.errors import UserError
from moe_jax.parallel.mesh import MeshConfig, make_mesh


class Moments(NamedTuple):
    """Stands for an optimizer's state."""

    mu: dict
    count: int


LAYOUTS = {
    "one": (MeshConfig(), 1),
    "data8": (MeshConfig(), 8),
    "expert8": (MeshConfig(data=1, expert=8), 8),
    "cube": (MeshConfig(data=1, fsdp=2, expert=2, tensor=2), 8),
    "expert4": (MeshConfig(data=1, expert=4), 4),
}
SPECS = {"w_in": P("expert", "fsdp", "tensor"), "scale": P(), "half": P(("data", "expert"), None)}


def make_tree(layout: str, seed: int = 0):
    """The same values for a seed, laid out on a mesh."""
    config, devices = LAYOUTS[layout]
    mesh = make_mesh(config, jax.devices()[:devices])
    rng = np.random.default_rng(seed)
    values = {
        "w_in": rng.normal(size=(8, 4, 6)).astype(np.float32),
        "scale": rng.normal(size=(5,)).astype(np.float32),
        "half": rng.normal(size=(8, 2)).astype(jnp.bfloat16),
    }
    arrays = {k: jax.device_put(v, NamedSharding(mesh, SPECS[k])) for k, v in values.items()}
    params = {"blocks": [{"w_in": arrays["w_in"]}, {"half": arrays["half"]}]}
    params["scale"] = arrays["scale"]
    moments = Moments({"scale": arrays["scale"] + 1}, 7)
    return {"params": params, "opt": (moments,), "step": np.int64(3)}


def abstract(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            np.shape(x), np.asarray(x).dtype, sharding=getattr(x, "sharding", None)
        ),
        tree,
    )


def saved(root, *steps: int, keep_last: int = 9, keep_every: int = 0) -> Checkpoints:
    checkpoints = Checkpoints(root, keep_last=keep_last, keep_every=keep_every)
    for step in steps:
        assert checkpoints.save(step, make_tree("cube", seed=step))
    checkpoints.wait()
    return checkpoints


def same_bits(a, b) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def files_of(root: pathlib.Path, step: int) -> list[pathlib.Path]:
    """The files of a step that a manifest covers, the largest (weights) first."""
    files = [p for p in (root / str(step)).rglob("*") if p.is_file() and p.stat().st_size]
    ours = ("manifest.json", "commit_success.txt", "_CHECKPOINT_METADATA")
    return sorted((p for p in files if p.name not in ours), key=lambda p: -p.stat().st_size)


def flip_bit(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_names():
    names = list(named_leaves(make_tree("one")))
    assert "params/blocks/0/w_in" in names and "opt/0/mu/scale" in names
    assert "opt/0/count" in names and "step" in names
    with pytest.raises(ValueError, match="two leaves"):
        named_leaves({"a/b": 1, "a": {"b": 2}})


@pytest.mark.parametrize("written", ["one", "cube", "expert8"])
def test_round_trip_on_every_layout(tmp_path, written):
    tree = make_tree(written)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, tree)
    checkpoints.wait()
    for layout in LAYOUTS:
        target = abstract(make_tree(layout))
        back = checkpoints.restore(3, target)
        assert jax.tree.structure(back) == jax.tree.structure(target)
        for name, leaf in named_leaves(back).items():
            assert same_bits(leaf, named_leaves(tree)[name]), name
            wanted = named_leaves(target)[name].sharding
            assert wanted is None or leaf.sharding == wanted
        assert isinstance(back["opt"][0], Moments) and int(back["opt"][0].count) == 7


def test_digest_is_free_of_the_mesh_and_sees_every_bit(tmp_path):
    digests = set()
    for layout in LAYOUTS:
        checkpoints = Checkpoints(tmp_path / layout)
        checkpoints.save(1, make_tree(layout))
        checkpoints.wait()
        digests.add(checkpoints.digest(1))
    leaves = sorted(named_leaves(make_tree("one")["params"]).items())
    assert digests == {array_digest(leaves)} and re.fullmatch("[0-9a-f]{64}", digests.pop())
    (name, value), *others = leaves
    flipped = np.array(value)
    flipped.view(np.uint8).reshape(-1)[0] ^= 1
    assert array_digest([(name, flipped), *others]) != array_digest(leaves)
    assert array_digest([(name, np.array(value).reshape(-1)), *others]) != array_digest(leaves)
    with pytest.raises(ValueError, match="sort"):
        array_digest(leaves[::-1])


def test_save_keeps_the_values_of_its_moment(tmp_path):
    """The state is donated to the next step while the save is still being written."""
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros((512, 1024))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, {"x": x})
    for _ in range(20):
        x = add_one(x)
    x.block_until_ready()
    checkpoints.wait()
    back = checkpoints.restore(0, {"x": jax.ShapeDtypeStruct(x.shape, x.dtype)})
    assert not back["x"].any()


def test_restore_subtree_reads_the_parameters_of_another_run(tmp_path):
    checkpoints = saved(tmp_path, 5)
    target = abstract(make_tree("expert4", seed=5)["params"])
    back = checkpoints.restore_subtree(5, "params", target)
    wanted = make_tree("cube", seed=5)["params"]
    assert jax.tree.all(jax.tree.map(same_bits, back, wanted))


@pytest.mark.parametrize("which", range(4))
def test_a_flipped_bit_in_any_file_is_found(tmp_path, which):
    checkpoints = saved(tmp_path, 1, 2)
    damaged = files_of(tmp_path, 2)[which]
    flip_bit(damaged)
    reports: list[str] = []
    assert checkpoints.latest_good(reports.append) == 1
    assert len(reports) == 1 and damaged.name in reports[0] and "step 2" in reports[0]
    assert checkpoints.steps() == [1] and checkpoints.quarantined() == ["2"]
    assert (tmp_path / "quarantine" / "2" / damaged.relative_to(tmp_path / "2")).exists()


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
    shutil.copytree(tmp_path / "1", tmp_path / "8.orbax-checkpoint-tmp")
    (tmp_path / "9").mkdir()
    (tmp_path / "9" / "data").write_bytes(b"half a save without a commit marker")
    (tmp_path / "notes.txt").write_text("hello")
    assert checkpoints.steps() == [1] and checkpoints.latest_good() == 1
    for step in (7, 8, 9):
        assert checkpoints.save(step, make_tree("cube", seed=step))
    checkpoints.wait()
    assert checkpoints.latest_good() == 9 and checkpoints.quarantined() == ["9"]


@pytest.mark.parametrize("marker", ["manifest.json", "commit_success.txt"])
def test_a_step_that_lost_its_marker_is_passed_over(tmp_path, marker):
    checkpoints = saved(tmp_path, 1, 2)
    (tmp_path / "2" / marker).unlink()
    assert checkpoints.latest_good() == 1


def test_a_fresh_folder_has_no_steps_and_is_not_written(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none")
    assert checkpoints.latest_good() is None and checkpoints.steps() == []
    assert not (tmp_path / "none").exists()


def test_retention(tmp_path):
    checkpoints = saved(tmp_path, *range(1, 9), keep_last=2, keep_every=3)
    assert checkpoints.steps() == [3, 6, 7, 8]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "6", "7", "8"]


def test_a_step_that_is_there_is_not_written_again(tmp_path):
    checkpoints = saved(tmp_path, 1)
    before = checkpoints.digest(1)
    assert not checkpoints.save(1, make_tree("one", seed=99))
    assert checkpoints.digest(1) == before


def change(tree, leaf):
    tree["params"]["scale"] = leaf
    return tree


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (
            lambda t: change(t, jax.ShapeDtypeStruct((6,), jnp.float32)),
            r"params/scale is float32\[5\] there and float32\[6\] in this config",
        ),
        (
            lambda t: change(t, jax.ShapeDtypeStruct((5,), jnp.bfloat16)),
            r"params/scale is float32\[5\] there and bfloat16\[5\] in this config",
        ),
        (
            lambda t: {**t, "ema": jax.ShapeDtypeStruct((2,), jnp.float32)},
            r"ema is absent there and float32\[2\] in this config",
        ),
        (
            lambda t: {k: v for k, v in t.items() if k != "step"},
            r"step is int64\[\] there and absent in this config",
        ),
    ],
)
def test_another_model_is_refused_by_leaf(tmp_path, edit, sentence):
    checkpoints = saved(tmp_path, 1)
    with pytest.raises(UserError, match=sentence):
        checkpoints.restore(1, edit(abstract(make_tree("one"))))


def test_a_typed_key_is_refused(tmp_path):
    with pytest.raises(TypeError, match="key_data"):
        Checkpoints(tmp_path).save(1, {"key": jax.random.key(0)})


def test_relative_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = saved("runs/checkpoints", 1)
    monkeypatch.chdir("/")
    back = checkpoints.restore(1, abstract(make_tree("one", seed=1)))
    assert same_bits(back["params"]["scale"], make_tree("one", seed=1)["params"]["scale"])


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


def test_disk(tmp_path):
    tree = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32), "n": 3}
    assert 4 * 2**20 < disk_needed(tree) < 2**28
    check_disk(tmp_path / "not" / "there" / "yet", disk_needed(tree))
    check_disk("gs://bucket/run", 2**80)
    with pytest.raises(UserError, match="GiB free"):
        check_disk(tmp_path / "run", 2**80)


KILLED = """
import sys
import jax.numpy as jnp
from moe_jax.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
for step in range(1, 1000):
    checkpoints.save(step, {"params": {"w": jnp.full((1024, 1024), step)}, "step": step})
    if step == 3:
        print("saving", flush=True)
"""


@pytest.mark.parametrize("kill", range(3))
def test_sigkill_during_saves(tmp_path, kill):
    """Whatever the kill leaves, the newest step that is found holds the values of that step."""
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout and run.stdout.readline() == "saving\n"
        # A temporary directory seen: a save is under way at this moment.
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


def test_command_line(tmp_path, capsys):
    checkpoints = saved(tmp_path / "checkpoints", 2, 10, 30)
    flip_bit(files_of(tmp_path / "checkpoints", 30)[0])
    assert main(["moe-checkpoint", f"--workdir={tmp_path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["2", "10", "30"]
    assert [line.split()[-1] for line in lines[:2]] == [checkpoints.digest(s) for s in (2, 10)]
    assert " ok " in lines[0] and " bad" in lines[2] and "SHA-256" in lines[2]
    assert checkpoints.steps() == [2, 10, 30]  # looking moves nothing


def test_command_line_lists_quarantine_apart(tmp_path, capsys):
    checkpoints = saved(tmp_path / "checkpoints", 1, 2)
    flip_bit(files_of(tmp_path / "checkpoints", 2)[0])
    checkpoints.latest_good()
    assert main(["moe-checkpoint", f"--workdir={tmp_path}"]) == 0
    streams = capsys.readouterr()
    assert len(streams.out.splitlines()) == 1 and "quarantine" in streams.err


def test_command_line_without_checkpoints(tmp_path, capsys):
    with pytest.raises(UserError, match="holds no checkpoint"):
        main(["moe-checkpoint", f"--workdir={tmp_path}"])
    with pytest.raises(UserError, match="--workdir"):
        main(["moe-checkpoint"])


def test_manifest_lists_the_weights(tmp_path):
    saved(tmp_path, 1)
    listed = json.loads((tmp_path / "1" / "manifest.json").read_text())["files"]
    assert {str(p.relative_to(tmp_path / "1")) for p in files_of(tmp_path, 1)} <= set(listed)
