"""A run goes on with other devices: the same batches, the same choices, losses to rounding.

In float64, where the sums of another mesh differ in the 16th digit: in float32 they differ in the
7th, steps multiply that, and sooner or later two experts that are nearly tied change places.
"""

import contextlib
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small_run import eval_rows, flags, small_config, train_rows, write_corpus

from moe_jax.checkpoint import Checkpoints
from moe_jax.checkpoint.tree import named_leaves
from moe_jax.config import to_json
from moe_jax.data.feed import DeviceFeed
from moe_jax.errors import UserError
from moe_jax.parallel.distributed import AGAIN, DONE
from moe_jax.train import loop
from moe_jax.train.record import write_run_record
from moe_jax.train.report import Reporter
from moe_jax.train.setup import first_state, prepare
from moe_jax.train.state import to_disk

STEPS = 14
OVERRIDES = {
    "precision": "float64",
    "model.num_layers": 1,
    "model.moe.every": 1,
    # A router with state, choices that are dropped, groups that eight devices do not split.
    "model.moe.router": "sigmoid_bias",
    "model.moe.options.sigmoid_bias.update_rate": 0.01,
    "model.moe.group_rows": 2,
    "train.batch_size": 16,
    "train.steps": STEPS,
    "optimizer.schedule": "constant",  # the leg of two processes ends by train.steps
    "eval.samples": 0,
}
COUNTS = ("step", "tokens", "step_tokens", "learning_rate")
FATES = ("assignments", "kept", "dropped", "unsampled", "padding", "lost_tokens", "unaccounted")
# float64 has 16 digits.  Losses agree to 1e-14 at first; 14 steps of AdamW, which divides small
# gradients by their own size, leave 1e-12.
CLOSE = 1e-10

pytestmark = pytest.mark.usefixtures("x64", "compiled_as_by_users")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("elastic") / "text")


@pytest.fixture
def leg(corpus, monkeypatch):
    """`leg(workdir, until, data=8)` goes on from the newest checkpoint, on as many devices, and
    stops after step `until`; returns what it said and the rows of each step that it read."""

    def run_leg(workdir: Path, until: int, **mesh: int) -> tuple[list[str], dict[int, np.ndarray]]:
        read: dict[int, np.ndarray] = {}

        class Recorded(DeviceFeed):
            def __next__(self):
                step, batch = super().__next__()
                read[step] = np.concatenate([batch.tokens_BT, batch.row_B[..., None]], axis=-1)
                return step, batch

        monkeypatch.setattr(loop, "DeviceFeed", Recorded)
        said: list[str] = []
        sizes = {f"mesh.{axis}": size for axis, size in ({"data": 1} | mesh).items()}
        devices = jax.devices()[: math.prod(mesh.values())]
        run = prepare(small_config(corpus, **OVERRIDES | sizes), workdir, said.append, devices)
        state = first_state(run, "", said.append)
        start = int(state.step)
        if start:
            equal_on_disk(run, state, start)
        write_run_record(str(workdir), to_json(run.config), {}, run.store.fingerprint)
        stop = SimpleNamespace(reached=lambda step: step == until)
        with Reporter(workdir, STEPS, True, start or None) as reporter:
            code = loop.train(run, state, reporter, stop, lambda phase: contextlib.nullcontext())
        run.checkpoints.close()
        assert code == (DONE if until == STEPS else AGAIN)
        return said, {step: rows for step, rows in read.items() if step < until}

    return run_leg


def equal_on_disk(run, state, step: int) -> None:
    """What was restored has the bits that were saved, parameters, moments and router state."""
    found = named_leaves(to_disk(state, run.model.layout))
    saved = run.checkpoints.restore(step, run.checkpoints.describe(step))
    assert found.keys() == saved.keys()
    for name, leaf in found.items():
        assert np.asarray(leaf).tobytes() == np.asarray(saved[name]).tobytes(), name


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Workdir of a run on eight devices that was never stopped, made by the first test."""
    return tmp_path_factory.mktemp("straight") / "run"


def undisturbed(leg, straight: Path) -> dict[int, np.ndarray]:
    ...


def same(found: Path, expected: Path, steps: int) -> None:
    """The first `steps` rows of two runs agree: counts exactly, losses to rounding."""
    here, there = train_rows(found), train_rows(expected)[:steps]
    assert [row["step"] for row in here] == list(range(1, steps + 1))
    for a, b in zip(here, there, strict=True):
        for name in (*COUNTS, *FATES):
            assert a[name] == b[name], (a["step"], name)
        for name in ("loss", "lm_loss", "balance_loss", "z_loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=0, abs=CLOSE), (a["step"], name)
        assert a["layers"]["dropped_capacity"] == b["layers"]["dropped_capacity"]
