"""A run resumes on other devices: same batches, same assignments, losses equal to rounding.

In float64, in which sums on another mesh differ in the 16th digit.  In float32 they differ in the
7th, each step amplifies that, and in the end two experts with nearly equal logits change places.
"""

import functools
import math
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from small_run import eval_rows, flags, train_rows, write_corpus

from moe_jax.checkpoint import Checkpoints
from moe_jax.checkpoint.tree import named_leaves
from moe_jax.cli import train as trainer
from moe_jax.data.feed import DeviceFeed
from moe_jax.errors import UserError
from moe_jax.parallel import distributed
from moe_jax.run import loop
from moe_jax.run.restore import restore_or_init_state
from moe_jax.run.setup import prepare
from moe_jax.train.state import to_disk

STEPS, FIRST = 14, 4
OVERRIDES = {
    "precision": "float64",
    "model.num_layers": 1,
    "model.moe.every": 1,
    # A router with state, and a capacity that drops assignments.
    "model.moe.router": "sigmoid_bias",
    "model.moe.options.sigmoid_bias.update_rate": 0.01,
    "model.moe.group_rows": 0,  # 2 on eight devices; a resumed run keeps it on fewer devices
    "train.batch_size": 16,
    "optimizer.schedule": "constant",  # the leg of two processes has another train.steps
    "checkpoint.every_steps": FIRST,
    "eval.samples": 0,
}
EXACT = (
    *("tokens", "step_tokens", "learning_rate"),
    *("assignments", "kept", "dropped", "unsampled", "padding", "lost_tokens", "unaccounted"),
)
ROUNDED = ("loss", "lm_loss", "balance_loss", "z_loss", "grad_norm")
CLOSE = 1e-10  # the tolerance of tests/run/test_mesh_invariance.py for 20 steps


@pytest.fixture(autouse=True)
def as_before():
    """Restore the settings that the trainer changes for its whole process."""
    handler = signal.getsignal(signal.SIGTERM)
    # With LLVM's lowest optimization level float64 results have only nine correct digits.
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    signal.signal(signal.SIGTERM, handler)
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("elastic") / "text")


@pytest.fixture
def leg(corpus, monkeypatch):
    """`leg(workdir, until, data=8)` resumes from the newest checkpoint on a mesh of those sizes.

    It is preempted after step `until`, and returns the rows that each step read.
    """

    def run_leg(workdir: Path, until: int, **mesh: int) -> dict[int, np.ndarray]:
        read: dict[int, np.ndarray] = {}

        class Recorded(DeviceFeed):
            def __next__(self):
                step, batch = super().__next__()
                read[step] = np.asarray(batch.tokens_BT)
                assert (np.ravel(batch.row_B) == np.arange(OVERRIDES["train.batch_size"])).all()
                return step, batch

        devices = jax.devices()[: math.prod(mesh.values())]
        monkeypatch.setattr(loop, "DeviceFeed", Recorded)
        monkeypatch.setattr(trainer, "prepare", functools.partial(prepare, devices=devices))
        monkeypatch.setattr(trainer, "restore_or_init_state", bits_kept)
        monkeypatch.setattr(distributed.Preemption, "reached", lambda self, step: step == until)
        sizes = {f"mesh.{axis}": size for axis, size in ({"data": 1} | mesh).items()}
        code = trainer.main(
            ["train", *flags(workdir, corpus, **OVERRIDES, **sizes, train__steps=STEPS)]
        )
        assert code == (distributed.DONE if until == STEPS else distributed.AGAIN)
        return {step: rows for step, rows in read.items() if step < until}

    return run_leg


def bits_kept(run, init_from, say):
    """Call `restore_or_init_state`; it must restore every saved bit, moments and bias included."""
    state = restore_or_init_state(run, init_from, say)
    if int(state.step):
        found = named_leaves(to_disk(state, run.model.layout))
        saved = run.checkpoints.restore(int(state.step), run.checkpoints.describe(int(state.step)))
        assert found.keys() == saved.keys()
        for name, leaf in found.items():
            assert np.asarray(leaf).tobytes() == np.asarray(saved[name]).tobytes(), name
    return state


def same(found: Path, expected: Path, steps: int) -> None:
    """Assert that the first `steps` rows agree: counts exactly, losses to rounding."""
    here, there = train_rows(found), train_rows(expected)[:steps]
    assert [row["step"] for row in here] == list(range(1, steps + 1))
    for a, b in zip(here, there, strict=True):
        for name in EXACT:
            assert a[name] == b[name], (a["step"], name)
        for name in ROUNDED:
            assert a[name] == pytest.approx(b[name], rel=0, abs=CLOSE), (a["step"], name)
        assert a["layers"]["dropped_capacity"] == b["layers"]["dropped_capacity"]
    assert max(row["dropped"] for row in here) > 0


@pytest.mark.lifecycle
def test_four_devices_and_an_expert_axis_go_on_from_eight(tmp_path, corpus, leg, capsys):
    straight, run = tmp_path / "straight", tmp_path / "run"
    expected = leg(straight, 2 * FIRST, data=8)
    shutil.copytree(straight, run)  # with step FIRST as its newest checkpoint
    shutil.rmtree(run / "checkpoints" / str(2 * FIRST))
    capsys.readouterr()
    read = leg(run, 2 * FIRST, data=2, expert=2)
    said = capsys.readouterr().out
    mesh = "mesh was data 8, is data 2 x expert 2: same batches, results equal up to rounding\n"
    assert mesh in said
    assert f"resuming from step {FIRST}\n" in said
    assert sorted(read) == [4, 5, 6, 7]
    for step, rows in read.items():
        np.testing.assert_array_equal(rows, expected[step])
    same(run, straight, 2 * FIRST)

    split = flags(run, corpus, **OVERRIDES, train__steps=STEPS, train__accumulation=4)
    with pytest.raises(UserError, match=r"a multiple of 2 \(a resumed run"):
        trainer.main(["train", *split])


@pytest.mark.full
def test_a_run_wanders_from_mesh_to_mesh(tmp_path, corpus, leg, pair):
    straight, run = tmp_path / "straight", tmp_path / "run"
    expected = leg(straight, STEPS, data=8)

    read = leg(run, 2, data=8)
    for until, mesh in ((4, {"data": 4}), (6, {"expert": 4}), (8, {"data": 2, "expert": 2})):
        read |= leg(run, until, **mesh)
    sizes = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.expert": 2}
    processes = pair(
        flags(run, corpus, **OVERRIDES, **sizes, train__steps=10),
        JAX_DISABLE_MOST_OPTIMIZATIONS="False",
    )
    ended = [(one, *one.communicate(timeout=240)) for one in processes]
    assert [one.returncode for one, _, _ in ended] == [distributed.DONE] * 2, ended
    read |= leg(run, 12, data=1)
    read |= leg(run, STEPS, expert=8)

    same(run, straight, STEPS)
    assert read.keys() | {8, 9} == expected.keys()
    for step, rows in read.items():
        np.testing.assert_array_equal(rows, expected[step])
    ends = [eval_rows(folder)[-1] for folder in (run, straight)]
    assert ends[0]["eval_loss"] == pytest.approx(ends[1]["eval_loss"], rel=0, abs=CLOSE)
    a, b = (Checkpoints(folder / "checkpoints") for folder in (run, straight))
    leaves = a.restore(STEPS, a.describe(STEPS)), b.restore(STEPS, b.describe(STEPS))
    for name in leaves[1]:
        np.testing.assert_allclose(leaves[0][name], leaves[1][name], rtol=0, atol=CLOSE)
