"""Processes start together, stop together, and write one checkpoint together."""

import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from moe_jax.checkpoint import Checkpoints
from moe_jax.cli.exit import run
from moe_jax.errors import UserError
from moe_jax.parallel import distributed

SLURM = {
    "SLURM_NTASKS": "4",
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
POD = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}


@pytest.fixture
def any_platform():
    """Unset the platform, as on a machine that does not request the CPU."""
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    yield
    jax.config.update("jax_platforms", before)


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        (SLURM, True),
        ({**SLURM, "SLURM_NTASKS": "1"}, False),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1"}, False),
        (POD, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, False),
        ({"TPU_ML_PLATFORM": "JAX"}, True),
        ({"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({**POD, "JOB_COMPLETION_INDEX": "1"}, True),
    ],
)
def test_detection(any_platform, environment, several):
    assert distributed.detect(environment) == several


@pytest.mark.parametrize("missing", ["SLURM_STEP_NODELIST", "SLURM_PROCID"])
def test_half_of_slurm_is_refused(missing):
    environment = {name: value for name, value in SLURM.items() if name != missing}
    with pytest.raises(UserError, match=f"{missing} is not set: start through srun"):
        distributed.detect(environment)


def test_half_of_a_pod_is_refused_and_the_cpu_stays_alone(any_platform):
    with pytest.raises(UserError, match="TPU_WORKER_ID"):
        distributed.detect({"TPU_WORKER_HOSTNAMES": "a,b"})
    jax.config.update("jax_platforms", "cpu")
    assert not distributed.detect(POD)


def test_pods_that_do_not_know_of_each_other_are_refused(any_platform):
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
    for platforms in (None, "cpu"):
        jax.config.update("jax_platforms", platforms)
        with pytest.raises(UserError, match="JOB_COMPLETION_INDEX"):
            distributed.detect(pod)


VARIABLES = dict(zip(distributed.VARIABLES, ("host:1", "2", "0"), strict=True))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"MOE_JAX_COORDINATOR": None}, "MOE_JAX_COORDINATOR= .*give all three"),
        ({"MOE_JAX_PROCESS_COUNT": None}, "MOE_JAX_PROCESS_COUNT=0 .*give all three"),
        ({"MOE_JAX_PROCESS_ID": "first"}, "MOE_JAX_PROCESS_ID=-1 do not"),
        ({"MOE_JAX_COORDINATOR": "host"}, "MOE_JAX_COORDINATOR=host has no port"),
        ({"MOE_JAX_PROCESS_ID": "2"}, "MOE_JAX_PROCESS_ID=2 is not below MOE_JAX_PROCESS_COUNT=2"),
    ],
)
def test_half_of_the_variables_is_refused(monkeypatch, changed, sentence):
    for name, value in (VARIABLES | changed).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=sentence):
        distributed.start()


@pytest.mark.parametrize(
    ("environment", "arguments", "expected"),
    [
        (
            VARIABLES,
            (),
            (
                ("host:1", 2, 0),
                {"cluster_detection_method": "deactivate", "coordinator_bind_address": None},
            ),
        ),
        ({**SLURM, **VARIABLES}, ("other:2", 3, 1), (("other:2", 3, 1), None)),
        ({**SLURM, **VARIABLES}, (), (("host:1", 2, 0), None)),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, (), ((), {"local_device_ids": []})),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "8(x4)"}, (), ((), {"local_device_ids": None})),
    ],
)
def test_what_jax_is_told(monkeypatch, environment, arguments, expected):
    told = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: told.append((a, k)))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    distributed.start(*arguments, heartbeat=7)
    [(given, named)] = told
    assert given == expected[0] and named.pop("heartbeat_timeout_seconds") == 7
    assert expected[1] is None or named == expected[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("host:1", 0, -1), "give all three"),
        (("", 2, 0), "give all three"),
        (("host", 2, 0), "has no port"),
        (("host:1", 2, 2), "count from 0"),
    ],
)
def test_half_of_the_flags_is_refused(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        distributed.start(*arguments)


def test_one_process_whatever_the_environment_says(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    distributed.start(process_count=1)
    assert not jax.distributed.is_initialized() and distributed.lead()


def test_sigterm_in_one_process():
    before = signal.getsignal(signal.SIGTERM)
    preemption = distributed.Preemption()
    preemption.defer()
    assert not preemption.reached(1)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.reached(2)
    preemption.close()
    assert signal.getsignal(signal.SIGTERM) == before


COMPILING = """
import signal, threading
import jax
import jax.numpy as jnp
from moe_jax.parallel import distributed

def slow(x):
    for _ in range(300):
        x = jnp.sin(x @ x) + x
    return x

preemption = distributed.Preemption()
main = threading.main_thread().ident
threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGTERM)).start()
while True:
    jax.clear_caches()
    jax.jit(slow).lower(jnp.ones((64, 64))).compile()
"""


def test_sigterm_before_the_first_step_ends_the_process_at_once(cli_env):
    """There is nothing to save yet, and an exception during a compilation would crash."""
    done = subprocess.run([sys.executable, "-c", COMPILING], env=cli_env, capture_output=True)
    assert (done.returncode, done.stderr) == (distributed.AGAIN, b"")


START = """
import os, pathlib, sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec as P
from moe_jax.checkpoint import Checkpoints
from moe_jax.errors import UserError
from moe_jax.parallel import distributed
from moe_jax.cli.commands import PROCESS_FLAGS, Command
from moe_jax.cli.parse import parse
from moe_jax.parallel.mesh import MeshConfig, make_mesh
given = parse(sys.argv, Command("", PROCESS_FLAGS, config=False)).flags
distributed.start(given.coordinator, given.process_count, given.process_id)
assert jax.process_count() == 2
"""

STOP = """
preemption = distributed.Preemption()
print("running", flush=True)
step = 0
while not preemption.reached(step):
    step += 1
    multihost_utils.sync_global_devices(str(step))
print(step, flush=True)
sys.exit(distributed.AGAIN)
"""

SAVE = """
mesh = make_mesh(MeshConfig(data=2, expert=2))
w = np.arange(32, dtype=np.float32).reshape(8, 4)
sharding = NamedSharding(mesh, P(("data", "expert")))
w = jax.make_array_from_callback(w.shape, sharding, lambda index: w[index])
tree = {"params": {"w": w}, "step": np.int64(1)}
checkpoints = Checkpoints(given.workdir, keep_last=1)
for step in (1, 2):
    assert checkpoints.save(step, tree)
    assert not checkpoints.save(step, tree)
checkpoints.wait()
multihost_utils.sync_global_devices("retained")
assert checkpoints.steps() == [2] and checkpoints.latest_good() == 2
like = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=NamedSharding(mesh, P(None, "expert")))
like = {"params": {"w": like}, "step": np.int64(0)}
step, back = checkpoints.restore_latest(lambda _: like)
assert step == 2
whole = multihost_utils.process_allgather(back["params"]["w"], tiled=True)
assert (whole == np.arange(32).reshape(8, 4)).all() and int(back["step"]) == 1
multihost_utils.sync_global_devices("before the damage")
if distributed.lead():  # damage one file, which only one of the two processes hashes
    files = pathlib.Path(checkpoints.root / "2").rglob("d/*")
    file = max(files, key=lambda path: path.stat().st_size)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"?")
multihost_utils.sync_global_devices("damaged")
try:
    checkpoints.restore_latest(lambda _: like)
except UserError as error:
    print(error)
if distributed.lead():
    file.write_bytes(whole)
"""


def test_sigterm_to_one_of_two_stops_both_at_one_step(tmp_path, pair):
    processes = pair([f"--workdir={tmp_path}"], ("-c", START + STOP))
    for process in processes:
        assert process.stdout and process.stdout.readline() == "running\n"
    processes[1].send_signal(signal.SIGTERM)
    ended = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [distributed.AGAIN] * 2, ended
    steps = [int(out.splitlines()[-1]) for out, _ in ended]
    assert steps[0] == steps[1] > 0


@pytest.mark.lifecycle
def test_two_processes_write_one_checkpoint(tmp_path, pair):
    processes = pair([f"--workdir={tmp_path / 'two'}"], ("-c", START + SAVE))
    ended = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    sentences = [out.splitlines()[-1] for out, _ in ended]
    assert sentences[0] == sentences[1] and "differs from what was written" in sentences[0]
    alone = Checkpoints(tmp_path / "one")
    w = np.arange(32, dtype=np.float32).reshape(8, 4)
    alone.save(2, {"params": {"w": w}})
    alone.wait()
    assert Checkpoints(tmp_path / "two").digest(2) == alone.digest(2)


@pytest.mark.parametrize(
    ("text", "several", "lost"),
    [
        ("Gloo AllReduce failed: ... Connection closed by peer [127.0.0.1]:33104", True, True),
        ("Barrier failed [type.googleapis.com/tensorflow.CoordinationServiceError='']", True, True),
        ("Gloo ReduceScatter failed: [pair.cc:299] writev [127.0.0.1]: Broken pipe", True, True),
        ("Broken pipe", True, False),
        ("Connection closed by peer", False, False),
        ("operands could not be broadcast together", True, False),
    ],
)
def test_an_error_of_a_lost_peer_is_told_from_ones_own(monkeypatch, text, several, lost):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: several)
    assert distributed.lost_peer(ValueError(text)) == lost


def test_a_command_that_loses_a_peer_asks_to_be_run_again(monkeypatch, capfd):
    def main(argv):
        raise ValueError("Connection reset by peer")

    class Gone(BaseException):
        pass

    def end(code):
        raise Gone(code)

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Gone, match="42"):
        run(main)
    said = capfd.readouterr().err
    assert "ValueError: Connection reset by peer" in said
    assert said.endswith("Another process of this run is gone: exit code 42.\n")
