"""The replay command on the steps of a run that was resumed on other devices."""

import shutil

import pytest
from small_run import flags, train_rows
from trainer import ENDS, OVERRIDES, Trainer

from moe_jax.parallel.distributed import DONE, FIX

pytestmark = pytest.mark.full

RUN = OVERRIDES | {
    "optimizer.schedule": "cosine",  # so that a step depends on train.steps as well
    "checkpoint.keep_last": 99,
    "model.moe.group_rows": 0,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus, cli_env):
    """A run with steps 1 to 4 on eight devices, 5 to 8 on four with an expert axis, then without.

    Each part has a longer schedule.
    """
    workdir = tmp_path_factory.mktemp("replay") / "run"
    for steps, devices, mesh in (
        (4, 8, {"mesh.data": 8}),
        (8, 4, {"mesh.data": 2, "mesh.expert": 2}),
        (10, 4, {"mesh.data": 4}),
    ):
        command = flags(workdir, corpus, **RUN | mesh, train__steps=steps)
        part = Trainer([*command, f"--devices={devices}"], cli_env)
        assert part.finish() == DONE, part.text
    assert [row["step"] for row in train_rows(workdir)] == list(range(1, 11))
    return workdir


@pytest.fixture
def replayed(run_cli, run):
    def again(step: int, *more: str, workdir=run):
        return run_cli(["moe_jax", "replay", f"--workdir={workdir}", f"--step={step}", *more])

    return again


@pytest.mark.parametrize("step", [3, 7, 10])
def test_a_step_of_each_part_bit_for_bit(replayed, step):
    """Without --devices the command makes as many virtual devices as the step used."""
    done = replayed(step)
    assert done.code == DONE, done
    assert f"Step {step} equals metrics.jsonl bit for bit." in done.out


def test_from_a_checkpoint_of_the_part_before(replayed, run, tmp_path):
    workdir = shutil.copytree(run, tmp_path / "run")
    for step in (4, 8):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    done = replayed(9, workdir=workdir)  # another mesh of the same size
    assert done.code == DONE, done
    assert "replaying steps 7 to 9" in done.out and "Step 9 equals metrics.jsonl" in done.out
    done = replayed(5, workdir=workdir)
    assert done.code == FIX and "Traceback" not in done.err
    assert "Step 4 used 8 devices, the next step used 4 devices, and there is no good" in done.err


def test_too_few_devices_are_one_sentence(replayed):
    done = replayed(3, "--devices=4")
    assert done.code == FIX and "Traceback" not in done.err
    assert "used 8 devices, and 4 devices would round differently" in done.err


def test_steps_of_two_processes(replayed, run, corpus, pair, tmp_path):
    """Two processes repeat the step; with one process the command says what differs."""
    workdir = shutil.copytree(run, tmp_path / "run")
    mesh = {"mesh.data": 4, "mesh.expert": 1}
    command = flags(workdir, corpus, **RUN | mesh, train__steps=14)
    ended = [(one, *one.communicate(timeout=ENDS)) for one in pair(command)]
    assert [one.returncode for one, _, _ in ended] == [DONE] * 2, ended

    command = [f"--workdir={workdir}", "--step=14", "--from_beginning"]
    ended = [
        (one, *one.communicate(timeout=ENDS)) for one in pair(command, ("-m", "moe_jax", "replay"))
    ]
    assert [one.returncode for one, _, _ in ended] == [DONE] * 2, ended
    assert "Step 14 equals metrics.jsonl bit for bit." in ended[0][1]
    for step in (8, 10, 12):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    alone = replayed(14, workdir=workdir)
    differs = "2 processes at step 14, and sums between processes may round differently"
    assert alone.code == (FIX if differs in alone.out else DONE), alone
