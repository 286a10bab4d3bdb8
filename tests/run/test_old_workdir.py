"""A workdir of an earlier version resumes with the results that version would have had."""

import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax
import pytest
from old_workdir import COMPILER, DEVICES, config_of, overrides, unpack
from small_run import ROOT, train_rows

from moe_jax.checkpoint import Checkpoints, array_digest, named_leaves
from moe_jax.parallel.distributed import DONE
from moe_jax.record.provenance import versions
from moe_jax.run.restore import restore_or_init_state
from moe_jax.run.setup import prepare
from moe_jax.train.state import to_disk

COMPUTING = ("jax", "jaxlib", "flax", "optax", "numpy")  # packages that decide the bits of a step
# Integers that depend only on the batch; the number of kept assignments also depends on rounding.
TOTALS = ("step", "step_tokens", "tokens", "assignments", "padding", "unaccounted", "skipped")
SMOOTH = ("loss", "lm_loss", "mean_loss", "z_loss", "learning_rate")


@pytest.fixture
def unpacked(tmp_path: pathlib.Path) -> pathlib.Path:
    """Folder of run/, texts/, stores/ and expected.json."""
    return unpack(tmp_path)


def expected(folder: pathlib.Path) -> dict[str, Any]:
    return json.loads((folder / "expected.json").read_text())


def cpu() -> str:
    """The processor and its vector instructions, which the compiler uses; empty off Linux."""
    path = pathlib.Path("/proc/cpuinfo")
    if not path.exists():
        return ""
    lines = path.read_text().split("\n\n")[0].splitlines()
    fields = {name.strip(): value.strip() for name, _, value in (s.partition(":") for s in lines)}
    kinds = ("amx", "avx", "bmi", "fma", "sse")
    vector = [flag for flag in fields.get("flags", "").split() if flag.startswith(kinds)]
    return " ".join([fields.get("model name", ""), fields.get("model", ""), *sorted(vector)])


def same_machine(folder: pathlib.Path) -> bool:
    """Whether processor and packages are those that wrote the file."""
    then = json.loads((folder / "run" / "versions.json").read_text())["packages"]
    now = versions()["packages"]
    packages = all(then[name] == now[name] for name in COMPUTING)
    return packages and cpu() == expected(folder)["cpu"]


def digests(folder: pathlib.Path, step: int) -> dict[str, str]:
    """Digests of the parts of the checkpoint of `step` for which the file has one."""
    checkpoints = Checkpoints(folder / "run" / "checkpoints")
    return {name: checkpoints.digest(step, name) for name in expected(folder)["digests"][str(step)]}


def digest(tree: Mapping[str, Any]) -> str:
    """`Checkpoints.digest` of a tree in memory."""
    leaves = named_leaves(tree)
    return array_digest((name, leaves[name]) for name in sorted(leaves))


def test_its_state_is_restored_bitwise(unpacked, monkeypatch):
    monkeypatch.chdir(unpacked)  # its config names texts and store by relative paths
    lines: list[str] = []
    config, devices = config_of(unpacked), jax.devices()[:DEVICES]
    run = prepare(config, unpacked / "run", lines.append, devices)
    state = restore_or_init_state(run, "", lines.append)
    run.checkpoints.close()
    assert "resuming from step 4" in lines
    tree = to_disk(state, run.model.layout)
    written = expected(unpacked)["digests"]["4"]
    assert {name: digest(tree[name]) for name in written} == written == digests(unpacked, 4)
    assert int(state.step) == int(state.guard["accepted"]) == 4


@pytest.mark.lifecycle
def test_it_goes_on_as_the_version_that_wrote_it(unpacked, cli_env):
    command = ["-m", "moe_jax", "train", f"--config={ROOT / 'configs' / 'tiny.py'}"]
    command += ["--workdir=run", f"--devices={DEVICES}"]
    command += [f"--config.{name}={value}" for name, value in overrides(unpacked).items()]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=unpacked,
        env=cli_env | COMPILER,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == DONE, done.stderr
    assert "resuming from step 4\n" in done.stdout
    rows, then = train_rows(unpacked / "run"), expected(unpacked)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    for row, old in zip(rows[4:], then["rows"], strict=True):
        assert {name: row[name] for name in TOTALS} == {name: old[name] for name in TOTALS}
        assert row["kept"] + row["dropped"] + row["padding"] == row["assignments"]
        for name in SMOOTH:
            # A different compiler rounds float32 sums differently (here 1e-7 per step), and if two
            # experts' scores are nearly equal, it may route one token of 128 to the other one.
            assert row[name] == pytest.approx(old[name], rel=1e-4), name
    assert Checkpoints(unpacked / "run" / "checkpoints").verify(8) is None
    if same_machine(unpacked):
        assert digests(unpacked, 8) == then["digests"]["8"]
        again = [{name: row[name] for name in then["rows"][0]} for row in rows[4:]]
        assert again == then["rows"]
