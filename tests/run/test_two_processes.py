"""Two processes over gloo train what one process trains."""

import pytest
from small_run import ROOT, eval_rows, flags, train_rows, write_corpus

from moe_jax.checkpoint import Checkpoints

OVERRIDES = {
    "model.num_layers": 1,
    "model.moe.every": 1,
    "mesh.data": 2,
    "mesh.expert": 2,
    "model.moe.group_rows": 4,
    "train.steps": 6,
    "checkpoint.every_steps": 3,
    "eval.samples": 0,
}


@pytest.mark.lifecycle
def test_the_same_losses_and_a_checkpoint_that_verifies(tmp_path, run_cli, pair):
    files = write_corpus(tmp_path / "text")
    alone = run_cli(
        ["moe_jax", "train", *flags(tmp_path / "one", files, **OVERRIDES), "--devices=4"]
    )
    assert alone.code == 0, alone.err
    ended = [
        (process, *process.communicate(timeout=240))
        for process in pair(flags(tmp_path / "two", files, **OVERRIDES))
    ]
    assert [process.returncode for process, _, _ in ended] == [0, 0], ended
    # Gloo's threads print by themselves and may interleave their lines.
    gloo = "[Gloo]", "connected peer ranks"
    quiet = [line for line in ended[1][1].splitlines() if not any(part in line for part in gloo)]
    # Only the lead prints, but that another process finds no program of its own in the cache.
    assert len(quiet) == 1 and quiet[0].startswith("process 1 compiled the train step in ")

    one, two = train_rows(tmp_path / "one"), train_rows(tmp_path / "two")
    assert [row["step"] for row in two] == [row["step"] for row in one] == [1, 2, 3, 4, 5, 6]
    for expected, found in zip(one, two, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["assignments"] == expected["assignments"]
        assert found["kept"] + found["dropped"] == found["assignments"] - found["padding"]
    ends = [eval_rows(tmp_path / name)[-1] for name in ("one", "two")]
    assert ends[1]["eval_loss"] == pytest.approx(ends[0]["eval_loss"], rel=1e-4)

    saved = Checkpoints(tmp_path / "two" / "checkpoints")
    assert saved.steps() == [3, 6]
    assert [saved.verify(step) for step in saved.steps()] == [None, None]
    assert saved.digest(3) != saved.digest(6)


FLIPS = (str(ROOT / "tests" / "faulty_device.py"), "4")
SLEEPS = """
import sys, threading
from moe_jax.run.control import Control
from moe_jax.cli.exit import run
from moe_jax.cli.train import main

after = Control.after

def sleep_after(self, done, preemption):
    if done == 4 and "--process_id=1" in sys.argv:
        threading.Event().wait()
    return after(self, done, preemption)

Control.after = sleep_after
sys.argv[0] = "moe_jax train"
run(main)
"""


@pytest.mark.full
def test_a_host_that_sleeps_in_a_step_ends_every_host_with_42(tmp_path, pair):
    """The sleeping process is found by its own watchdog; the other waits for it, or loses it."""
    given = flags(
        tmp_path / "run",
        write_corpus(tmp_path / "text"),
        **OVERRIDES | {"watchdog.step": 10.0, "watchdog.checkpoint": 60.0},
    )
    ended = [(one, *one.communicate(timeout=240)) for one in pair(given, ("-c", SLEEPS))]
    assert [process.returncode for process, _, _ in ended] == [42, 42], ended[0][2][-3000:]
    first, second = (err for _, _, err in ended)
    assert "Error: step has taken more than 10 s (watchdog.step)" in second
    assert "in sleep_after" in second
    assert "Another process of this run is gone" in first or "watchdog.step" in first
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [3]


@pytest.mark.full
def test_a_bit_that_flips_on_one_host_is_named_by_device_and_leaf(tmp_path, pair):
    """All hosts end with 42 before anything is saved; the same command then finishes the run."""
    given = flags(
        tmp_path / "run",
        write_corpus(tmp_path / "text"),
        **OVERRIDES | {"train.replica_check_every": 1000},  # only the saves are left to check
    )
    ended = [(one, *one.communicate(timeout=240)) for one in pair(given, FLIPS)]
    assert [process.returncode for process, _, _ in ended] == [42, 42], ended[0][2][-3000:]
    [said] = [line for line in ended[0][1].splitlines() if line.startswith("REPLICAS DIFFER")]
    assert (
        "at step 6 params/embed_VD differs on device " in said and "(process 1) from device" in said
    )
    assert "(equal at step 3)" in said and "resume from step 3" in said
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [3]
    ended = [(one, *one.communicate(timeout=240)) for one in pair(given)]
    assert [process.returncode for process, _, _ in ended] == [0, 0], ended[0][2][-3000:]
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [3, 6]
