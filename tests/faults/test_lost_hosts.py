"""Checks 22 and 23: an exception on one host, and hosts that die or freeze."""

import os
import signal
import sys
from pathlib import Path

import pytest
from small_run import flags
from trainer import OVERRIDES, assert_same_end, checkpoints, free_port, peers

from moe_jax.parallel.distributed import AGAIN, DONE, FIX

HEARTBEAT = 5  # seconds
# What a survivor ends with: its collective fails, or JAX's coordination service aborts it.
GONE = (AGAIN, -signal.SIGABRT)
STEPS = int(str(OVERRIDES["train.steps"]))
RUN = OVERRIDES | {"mesh.data": 2, "watchdog.heartbeat": HEARTBEAT}
# Two hosts that meet once, in the smallest program that starts and ends as the trainer does.
MEETS = f"""
import os, signal, sys
from jax.experimental import multihost_utils
from moe_jax.parallel import distributed
from moe_jax.train import flags

def main(argv):
    distributed.start(argv[1], 2, int(argv[2]), heartbeat={HEARTBEAT})
    multihost_utils.sync_global_devices("here")
    if argv[2] == "1" and argv[3] == "raises":
        raise ZeroDivisionError("planted")
    if argv[2] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    multihost_utils.sync_global_devices("never")

flags.run(main)
"""
RAISES = """
import sys
from moe_jax.train.__main__ import cli
from moe_jax.train.control import Control

after = Control.after

def raise_after(self, done, preemption):
    if done == 5 and "--process_id=1" in sys.argv:
        raise ZeroDivisionError("planted")
    return after(self, done, preemption)

Control.after = raise_after
sys.argv[0] = "moe_jax.train"
cli()
"""


@pytest.mark.parametrize("fault", ["raises", "stops"])
def test_a_host_that_is_gone_ends_the_other(trainers, fault):
    """The frozen host ends as well once it can run again."""
    program = [sys.executable, "-c", MEETS]
    address = f"localhost:{free_port()}"
    first, second = (trainers([address, str(i), fault], program=program) for i in range(2))
    assert first.finish(60) in GONE, first.text
    if fault == "raises":
        assert second.finish(60) == FIX
        assert second.lines[-1] == "ZeroDivisionError: planted"
    else:
        second.process.send_signal(signal.SIGCONT)
        assert second.finish(60) in GONE, second.text


@pytest.mark.full
@pytest.mark.parametrize("failing", [0, 1])
def test_an_exception_on_one_host_of_a_run(tmp_path, corpus, trainers, failing):
    program = [sys.executable, "-c", RAISES.replace("=1", f"={failing}")]
    command = flags(tmp_path / "run", corpus, **RUN)
    hosts = [trainers([*command, *own], program=program) for own in peers(2, 1)]
    hosts[0].wait_for("^step 4/")
    assert hosts[failing].finish(30) == FIX
    assert hosts[failing].lines[-1] == "ZeroDivisionError: planted"
    assert hosts[1 - failing].finish(30) in GONE, hosts[1 - failing].text
    saved = checkpoints(tmp_path / "run")
    assert saved.latest_good() in (2, 4) and saved.quarantined() == []


def child_of(pid: int) -> int:
    [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return tmp_path_factory.mktemp("straight") / "run"


@pytest.mark.full
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_supervisors_bring_a_run_to_its_end(tmp_path, corpus, trainers, straight, fault, victim):
    if not straight.exists():
        pair = [trainers([*flags(straight, corpus, **RUN), *own]) for own in peers(2, 1)]
        assert [run.finish() for run in pair] == [DONE, DONE], pair[0].text

    python = [sys.executable, "-m"]
    program = [*python, "launch.supervise", "--wait=1", "--max_wait=5", "--"]
    program += [*python, "moe_jax.train"]
    command = flags(tmp_path / "run", corpus, **RUN)
    pair = [trainers([*command, *own], program=program) for own in peers(2, 1)]
    pair[0].wait_for("^step 5/")
    pid = child_of(pair[victim].process.pid)
    os.kill(pid, fault)
    # The survivor: at the latest when the heartbeats have stayed away.
    pair[1 - victim].wait_for(r" restart 1: (asked to be run again|killed by SIGABRT|ended by SIG)")
    if fault == signal.SIGSTOP:
        os.kill(pid, signal.SIGCONT)
    assert [run.finish() for run in pair] == [DONE, DONE], pair[0].text
    assert " restart 1: " in pair[victim].text
    assert "resuming from step" in pair[0].text
    assert_same_end(tmp_path / "run", straight, STEPS)
