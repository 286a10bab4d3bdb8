"""Tests that an exception on one host, or a killed or frozen host, ends the other host.

Supervisors then finish the run (checks 22 and 23 of docs/reliability.md).
"""

import os
import select
import signal
import sys
from pathlib import Path

import pytest
from small_run import flags
from trainer import OVERRIDES, assert_same_end, checkpoints, free_port, peers

from moe_jax.parallel.distributed import AGAIN, DONE, FIX

HEARTBEAT = 5  # seconds
GONE_IN = HEARTBEAT + 5  # seconds after the fault
ALL_GONE_IN = 30  # seconds after an exception
# Exit codes of a survivor: its collective fails, or JAX's coordination service aborts it.
GONE = (AGAIN, -signal.SIGABRT)
STEPS = int(str(OVERRIDES["train.steps"]))
RUN = OVERRIDES | {"mesh.data": 2, "watchdog.heartbeat": HEARTBEAT}
# Two hosts that pass one barrier, in the smallest program that starts and ends like the trainer.
MEETS = f"""
import os, signal, sys
from jax.experimental import multihost_utils
from moe_jax.parallel import distributed
from moe_jax.cli.exit import run

def main(argv):
    distributed.start(argv[1], 2, int(argv[2]), heartbeat={HEARTBEAT})
    multihost_utils.sync_global_devices("here")
    if argv[2] == "1" and argv[3] == "raises":
        raise ZeroDivisionError("planted")
    if argv[2] == "1" and argv[3] == "stops":
        print("stops", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    multihost_utils.sync_global_devices("never")

run(main)
"""
# The same, but a host is killed after Python has run all its other exit handlers.
ENDS = """
import atexit, os, signal, sys
if sys.argv[2] == "1":
    atexit.register(os.kill, os.getpid(), signal.SIGKILL)  # registered first, so it runs last
""" + MEETS.replace("never", "here again")
# The save of step 4 ends after the exception, and the failing host must wait for it.
RAISES = """
import sys, threading
from moe_jax.checkpoint import manifest
from moe_jax.cli.exit import run
from moe_jax.cli.train import main
from moe_jax.run.control import Control

after, write = Control.after, manifest.write

def write_slowly(directory):
    threading.Event().wait(3)
    write(directory)

def raise_after(self, done, preemption):
    if done == 5 and "--process_id=1" in sys.argv:
        raise ZeroDivisionError("planted")
    return after(self, done, preemption)

Control.after, manifest.write = raise_after, write_slowly
sys.argv[0] = "moe_jax train"
run(main)
"""


@pytest.mark.parametrize("fault", [pytest.param("raises", marks=pytest.mark.lifecycle), "stops"])
def test_a_host_that_is_gone_ends_the_other(trainers, fault):
    """The frozen host ends as well once it can run again."""
    program = [sys.executable, "-c", MEETS]
    address = f"localhost:{free_port()}"
    first, second = (trainers([address, str(i), fault], program=program) for i in range(2))
    if fault == "raises":
        second.wait_for("^Traceback")
        assert first.finish(ALL_GONE_IN) in GONE, first.text
        assert second.finish(ALL_GONE_IN) == FIX
        assert second.lines[-1] == "ZeroDivisionError: planted"
    else:
        second.wait_for("^stops")
        assert first.finish(GONE_IN) in GONE, first.text
        second.process.send_signal(signal.SIGCONT)
        assert second.finish(GONE_IN) in GONE, second.text


def test_hosts_that_have_met_at_the_end_are_done(trainers):
    """After the last barrier a kill must not cause one host to be restarted without the other."""
    program, address = [sys.executable, "-c", ENDS], f"localhost:{free_port()}"
    pair = [trainers([address, str(i), "ends"], program=program) for i in range(2)]
    assert [host.finish() for host in pair] == [DONE, DONE], pair[1].text


@pytest.mark.full
@pytest.mark.parametrize("failing", [0, 1])
def test_an_exception_on_one_host_of_a_run(tmp_path, corpus, trainers, failing):
    """The save in progress is committed before the failing host ends."""
    program = [sys.executable, "-c", RAISES.replace("=1", f"={failing}")]
    command = flags(tmp_path / "run", corpus, **RUN)
    hosts = [trainers([*command, *own], program=program) for own in peers(2, 1)]
    hosts[0].wait_for("^step 4/")
    assert hosts[failing].finish(ALL_GONE_IN) == FIX
    assert hosts[failing].lines[-1] == "ZeroDivisionError: planted"
    assert hosts[1 - failing].finish(ALL_GONE_IN) in GONE, hosts[1 - failing].text
    saved = checkpoints(tmp_path / "run")
    assert saved.latest_good() == 4 and saved.quarantined() == []


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
    program += [*python, "moe_jax", "train"]
    command = flags(tmp_path / "run", corpus, **RUN)
    pair = [trainers([*command, *own], program=program) for own in peers(2, 1)]
    pair[0].wait_for("^step 5/")
    pid, survivor = (child_of(pair[i].process.pid) for i in (victim, 1 - victim))
    ended = os.pidfd_open(survivor)
    os.kill(pid, fault)
    # It ends at the latest when heartbeats are missing.
    assert select.select([ended], [], [], GONE_IN)[0], pair[1 - victim].text
    os.close(ended)
    pair[1 - victim].wait_for(r" restart 1: (asked to be run again|killed by SIGABRT|ended by SIG)")
    if fault == signal.SIGSTOP:
        os.kill(pid, signal.SIGCONT)
    assert [run.finish() for run in pair] == [DONE, DONE], pair[0].text
    assert " restart 1: " in pair[victim].text
    assert "resuming from step" in pair[0].text
    assert_same_end(tmp_path / "run", straight, STEPS)
