"""Checkpoints are restored bit by bit on any mesh, and the list of steps is correct."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_trees import (
    LAYOUTS,
    Moments,
    abstract,
    files_of,
    flip_bit,
    make_tree,
    same_bits,
    saved,
)

from moe_jax.checkpoint import Checkpoints, array_digest, check_disk, disk_needed, named_leaves
from moe_jax.cli.checkpoint import main
from moe_jax.errors import UserError


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
    """The next step reuses the donated state while the save is still being written."""
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
            r"params/scale is float32\[5\] in the checkpoint and float32\[6\] in this config",
        ),
        (
            lambda t: change(t, jax.ShapeDtypeStruct((5,), jnp.bfloat16)),
            r"params/scale is float32\[5\] in the checkpoint and bfloat16\[5\] in this config",
        ),
        (
            lambda t: {**t, "ema": jax.ShapeDtypeStruct((2,), jnp.float32)},
            r"ema is absent in the checkpoint and float32\[2\] in this config",
        ),
        (
            lambda t: {k: v for k, v in t.items() if k != "step"},
            r"step is int64\[\] in the checkpoint and absent in this config",
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


def test_disk(tmp_path):
    tree = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32), "n": 3}
    assert 4 * 2**20 < disk_needed(tree) < 2**28
    check_disk(tmp_path / "not" / "there" / "yet", disk_needed(tree))
    check_disk("gs://bucket/run", 2**80)
    with pytest.raises(UserError, match=r"\d TiB and .*\d [GT]iB free"):
        check_disk(tmp_path / "run", 2**80)


def test_command_line(tmp_path, capsys):
    checkpoints = saved(tmp_path / "checkpoints", 2, 10, 30)
    assert main(["moe-checkpoint", f"--workdir={tmp_path}", "--verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["2", "10", "30"]
    assert [line.split()[-1] for line in lines] == [checkpoints.digest(s) for s in (2, 10, 30)]

    flip_bit(files_of(tmp_path / "checkpoints", 30)[0])
    assert main(["moe-checkpoint", f"--workdir={tmp_path}", "--verify"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "  ok  " in lines[0] and "  bad: " in lines[2] and "SHA-256" in lines[2]
    assert main(["moe-checkpoint", f"--workdir={tmp_path}"]) == 0  # listing reads no file
    assert "step 30  complete  " in capsys.readouterr().out
    files_of(tmp_path / "checkpoints", 2)[0].unlink()
    assert main(["moe-checkpoint", f"--workdir={tmp_path}"]) == 1
    assert " is missing  " in capsys.readouterr().out.splitlines()[0]
    assert checkpoints.steps() == [2, 10, 30]  # listing moves no step


def test_command_line_lists_quarantine_apart(tmp_path, capsys):
    checkpoints = saved(tmp_path / "checkpoints", 1, 2)
    flip_bit(files_of(tmp_path / "checkpoints", 2)[0])
    checkpoints.latest_good()
    assert main(["moe-checkpoint", f"--workdir={tmp_path}"]) == 0
    streams = capsys.readouterr()
    assert len(streams.out.splitlines()) == 1 and "quarantine" in streams.err


def test_command_line_without_checkpoints(tmp_path, capsys):
    with pytest.raises(UserError, match="has no checkpoints"):
        main(["moe-checkpoint", f"--workdir={tmp_path}"])
    with pytest.raises(UserError, match="--workdir"):
        main(["moe-checkpoint"])


def test_manifest_lists_the_weights(tmp_path):
    saved(tmp_path, 1)
    listed = json.loads((tmp_path / "1" / "manifest.json").read_text())["files"]
    assert {str(p.relative_to(tmp_path / "1")) for p in files_of(tmp_path, 1)} <= set(listed)


IN_SOMEBODYS_PROGRAM = """
import gc
import os
import signal
import sys
import threading
import absl.logging
import numpy as np
import orbax.checkpoint  # its own effects on the process do not count

def process():
    hooks = sys.excepthook, sys.unraisablehook, threading.excepthook
    logs = list(absl.logging.get_absl_logger().filters), absl.logging.get_verbosity()
    signals = [signal.getsignal(number) for number in signal.valid_signals()]
    return hooks, logs, signals, dict(os.environ), gc.isenabled(), gc.get_freeze_count()

before = process()
import moe_jax.run.loop
from moe_jax.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, {"w": np.zeros(3, np.float32)})
checkpoints.close()
assert process() == before
"""


def test_the_callers_process_stays_as_it_is(tmp_path, cli_env):
    program = [sys.executable, "-c", IN_SOMEBODYS_PROGRAM, str(tmp_path)]
    done = subprocess.run(program, env=cli_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
