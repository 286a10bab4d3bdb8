"""A replica that differs by one bit ends the run, and no differing state is saved."""

import json
import signal
from types import SimpleNamespace

import pytest
from faulty_device import corrupts
from small_run import flags, train_rows, write_corpus

from moe_jax.checkpoint import Checkpoints
from moe_jax.cli import train as program
from moe_jax.cli.goodput import main as goodput
from moe_jax.cli.train import main
from moe_jax.parallel.distributed import AGAIN, DONE
from moe_jax.parallel.replicas import Difference
from moe_jax.run import replica_check
from moe_jax.run.replica_check import ReplicaCheck, describe
from moe_jax.train.state import TrainState

BAD = 5  # device
STATE = object.__new__(TrainState)  # its fields are never read
OVERRIDES = {
    "model.num_layers": 1,
    "model.moe.every": 1,
    "mesh.data": 4,
    "mesh.expert": 2,
    "model.moe.group_rows": 4,
    "train.replica_check_every": 2,
    "checkpoint.every_steps": 4,
    "eval.samples": 0,
}


@pytest.fixture
def sigterm():
    """Restore the SIGTERM handler, which the trainer replaces until its process ends."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.lifecycle
def test_a_run_ends_within_the_interval_and_goes_on_from_the_last_save(
    tmp_path, monkeypatch, capsys, sigterm
):
    workdir = tmp_path / "run"
    command = ["train", *flags(workdir, write_corpus(tmp_path / "text"), **OVERRIDES)]
    with monkeypatch.context() as patch:
        patch.setattr(program, "start_lowering", corrupts(5, BAD))
        assert main(command) == AGAIN
    out = capsys.readouterr().out
    [said] = [line for line in out.splitlines() if line.startswith("REPLICAS DIFFER")]
    assert f"at step 6 params/embed_VD differs on device {BAD} (process 0) from device 0 " in said
    assert "(equal at step 4)" in said
    assert "resume from step 4" in said
    assert Checkpoints(workdir / "checkpoints").steps() == [4]

    assert main(command) == DONE
    assert "REPLICAS DIFFER" not in capsys.readouterr().out
    assert [row["step"] for row in train_rows(workdir)] == list(range(1, 9))
    assert Checkpoints(workdir / "checkpoints").steps() == [4, 8]

    assert goodput(["goodput", f"--workdir={workdir}", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    first, second = told["attempts"]
    assert (first["resumed_from"], first["reached"], first["exit_code"]) == (0, 6, AGAIN)
    assert (second["resumed_from"], second["reached"], second["exit_code"]) == (4, 8, DONE)
    assert first["lost_steps"] == 2
    seconds = told["seconds"]
    assert sum(seconds.values()) == pytest.approx(told["whole_seconds"])
    assert all(seconds[name] > 0 for name in ("step", "lost", "compile", "checkpoint", "init"))


@pytest.fixture
def checked(monkeypatch):
    """(what a comparison finds, ReplicaCheck every 10 steps, lines)."""
    found, lines = [], []
    fake = SimpleNamespace(compare=lambda state: list(found))
    monkeypatch.setattr(replica_check, "Replicas", lambda state: fake)
    monkeypatch.setattr(replica_check, "placed_state", lambda *_: None)
    checkpoints = SimpleNamespace(wait=lambda: lines.append("waited"), steps=lambda: [10, 15])
    config = SimpleNamespace(train=SimpleNamespace(replica_check_every=10))
    run = SimpleNamespace(config=config, checkpoints=checkpoints, model=0, optimizer=0, mesh=0)
    return found, ReplicaCheck(run, lines.append), lines


def device(number):
    return SimpleNamespace(id=number, process_index=number // 4)


def test_checks_come_every_so_many_steps_and_before_each_save(checked):
    found, replicas, lines = checked
    assert not replicas.differ(10, STATE, save_now=False)
    assert not replicas.differ(15, STATE, save_now=True)
    found.append(Difference("params/norm", [device(5)], [device(1)]))
    assert not any(replicas.differ(step, STATE, save_now=False) for step in range(16, 20))
    assert replicas.differ(17, STATE, save_now=True)
    assert replicas.differ(20, STATE, save_now=False)
    replicas.give_up()
    assert lines[0] == "waited"  # the save of step 15 may still be in progress
    assert lines[1] == (
        "REPLICAS DIFFER: at step 20 params/norm differs on device 5 (process 1) from device 1 "
        "(process 0) (equal at step 15).  The state was not saved.  Run the same command again to "
        "resume from step 15.  If the same device is named again, take it out of service."
    )


def test_never_where_the_config_says_so(checked):
    found, replicas, _ = checked
    found.append(Difference("params/norm", [device(5)], [device(1)]))
    replicas._run.config.train.replica_check_every = 0
    off = ReplicaCheck(replicas._run, print)
    assert not off.differ(10, STATE, save_now=True)


def test_many_devices_and_leaves_stay_one_line():
    found = [Difference(f"params/{n}", list(map(device, range(20))), []) for n in range(3)]
    text = describe(7, [*found, found[0]], None)
    assert text.startswith("at step 7 params/0 and 2 more leaves differ between device 0 (process")
    assert text.endswith("device 7 (process 1), 12 more (no earlier check)")
