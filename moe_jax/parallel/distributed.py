"""Starts and stops the processes of a run, and defines the exit codes that a launcher reads."""

import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence

import jax

# Private, as in exchange.py: jax.process_index() would start the backends, which may fail.
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

from moe_jax.errors import UserError
from moe_jax.parallel.coordinator import bind_address, chosen_by_user

DONE = 0  # exit code: finished, or stopped by the user's STOP file
FIX = 1  # the user must fix something
DIVERGED = 3  # the loss diverged; running again would diverge again
AGAIN = 42  # run the same command again: preempted, the watchdog fired, or a peer is gone
INTERRUPTED = 130  # Ctrl-C, as in shells
# Texts that the errors of gloo, NCCL and JAX's coordination service contain when another process
# is gone.
_LOST = (
    *("Gloo", "Connection closed by peer", "Connection reset by peer"),
    *("remote process exited", "CoordinationServiceError"),
)

# Equivalents of --coordinator, --process_count and --process_id, set by launchers.
VARIABLES = ("MOE_JAX_COORDINATOR", "MOE_JAX_PROCESS_COUNT", "MOE_JAX_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
_ALONE = "pass --process_count=1 for one process."


def start(
    coordinator: str = "", process_count: int = 0, process_id: int = -1, heartbeat: int = 100
) -> None:
    """Join the processes of a run; call this before anything that touches a device.

    The first source that is set decides: the three arguments, the environment variables `VARIABLES`
    (Kubernetes, a shell loop), several tasks under Slurm's srun, several TPU hosts (TPU VM pods,
    GKE).  `process_count=1` alone means one process, regardless of the environment.

    If the other processes do not join within five minutes, JAX ends this one with SIGABRT (134).

    Args:
      coordinator: HOST:PORT of process 0, reachable by all; "": not given.
      process_count: number of processes; 0: not given.
      process_id: index of this process, from 0; -1: not given.
      heartbeat: seconds without a heartbeat from one process after which JAX aborts the others.

    Raises:
      UserError: some of the three are missing or invalid, or the environment is incomplete.
    """
    if (coordinator, process_count, process_id) == ("", 1, -1):
        return
    if coordinator or process_count or process_id != -1:
        names = ("--coordinator", "--process_count", "--process_id")
        _check_explicit(names, coordinator, process_count, process_id)
    elif any(name in os.environ for name in VARIABLES):
        coordinator, process_count, process_id = _from_variables(os.environ)
    if coordinator:
        jax.distributed.initialize(
            coordinator,
            process_count,
            process_id,
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=heartbeat,
            coordinator_bind_address=_bind(coordinator) if process_id == 0 else None,
        )
    elif detect(os.environ):
        # By default JAX gives each Slurm task one GPU, even if its node has no other task.
        one_a_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0] == "1"
        jax.distributed.initialize(
            local_device_ids=[] if one_a_node else None, heartbeat_timeout_seconds=heartbeat
        )


def _bind(coordinator: str) -> str | None:
    """The address process 0 listens on; None: all addresses, or the one the user set in JAX."""
    if chosen_by_user():
        return None
    address = bind_address(coordinator)
    if address is None:
        print(
            f"the coordinator listens on all addresses of this host: {coordinator} does not name "
            f"exactly one of them",
            flush=True,
        )
    return address


def detect(environment: Mapping[str, str]) -> bool:
    """True if Slurm or TPU hosts ask for several processes; raises UserError if incomplete."""
    tasks = environment.get("SLURM_NTASKS", "1")
    if tasks.isdigit() and int(tasks) > 1:
        missing = [name for name in _SLURM if name not in environment]
        if missing:
            raise UserError(
                f"Slurm gives {tasks} tasks but {missing[0]} is not set: start through srun, or "
                f"{_ALONE}"
            )
        return True
    if jax.config.jax_platforms == "cpu":
        _refuse_nameless_pod(environment)
        return False  # one TPU host may run alone on its CPU
    # Cloud TPU and GKE name the hosts of a pod here; jax prefers the first of the two.
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    if "," in hosts and "TPU_WORKER_ID" not in environment:
        raise UserError(
            f"TPU_WORKER_HOSTNAMES lists several hosts but TPU_WORKER_ID is not set: set it, or "
            f"{_ALONE}"
        )
    if not hosts:
        _refuse_nameless_pod(environment)
    # jax sets TPU_ML_PLATFORM if it finds TPU chips; it can then ask the metadata server, unless
    # TPU_SKIP_MDS_QUERY forbids it.
    can_ask = "TPU_ML_PLATFORM" in environment and "TPU_SKIP_MDS_QUERY" not in environment
    return "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in environment or can_ask


def _refuse_nameless_pod(environment: Mapping[str, str]) -> None:
    """Without this check the pods of an indexed job would each train alone in the same workdir."""
    if "JOB_COMPLETION_INDEX" in environment:
        raise UserError(
            f"This pod has an index (JOB_COMPLETION_INDEX) but {VARIABLES[0]} is not set: set "
            f"{', '.join(VARIABLES)} in its manifest, or {_ALONE}"
        )


def lost_peer(error: BaseException) -> bool:
    """True if `error` means that another process of this run is gone, not a fault of this one.

    A collective over gloo raises as soon as the connection ends, and JAX's coordination service
    raises in processes that wait at a barrier.  (A process that waits elsewhere is aborted with
    134.)
    """
    chain: BaseException | None = error
    texts = []
    while chain is not None:  # Orbax wraps the errors of its own collectives
        texts.append(str(chain))
        chain = chain.__cause__
    said = any(word in text for text in texts for word in _LOST)
    return said and jax.distributed.is_initialized()


def exit_code(error: BaseException) -> int:
    """The exit code of a command that failed with `error`."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return AGAIN if not isinstance(error, UserError) and lost_peer(error) else FIX


def lead() -> bool:
    """True in the lead process, the one that writes and prints; touches no device."""
    return global_state.process_id == 0


class Preemption:
    """Notices SIGTERM.  Create it after `start`; call `reached` after every step on every process.

    One process: our handler sets a flag; before `defer` there is no step to wait for, so it ends
    the process with AGAIN at once.  Several processes: jax.distributed catches the signal and all
    processes agree on the step to stop at; our own handler would silently disable that.
    """

    def __init__(self):
        self._several = jax.distributed.is_initialized()
        self._asked = self._deferred = False
        # None: there is no handler to restore.
        self._before = None if self._several else signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: object) -> None:
        if not self._deferred:
            # Not an exception: unwinding from the middle of a compilation crashes the interpreter.
            sys.stdout.flush()
            os._exit(AGAIN)
        self._asked = True

    def defer(self) -> None:
        """Delay SIGTERM to the end of a step from now on, because there is state to save."""
        self._deferred = True

    def reached(self, step: int) -> bool:
        """True if the run must save and exit with AGAIN after `step`.

        With several processes it is true after exactly one step, the same on all of them.
        """
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def close(self) -> None:
        """Restore the previous handler of SIGTERM."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)


def _from_variables(environment: Mapping[str, str]) -> tuple[str, int, int]:
    coordinator, count, index = (environment.get(name, "") for name in VARIABLES)
    whole = re.compile(r"\d+")
    process_count = int(count) if whole.fullmatch(count) else 0
    process_id = int(index) if whole.fullmatch(index) else -1
    _check_explicit(VARIABLES, coordinator, process_count, process_id)
    return coordinator, process_count, process_id


def _check_explicit(
    names: Sequence[str], coordinator: str, process_count: int, process_id: int
) -> None:
    if not coordinator or process_count < 1 or process_id < 0:
        given = zip(names, (coordinator, process_count, process_id), strict=True)
        raise UserError(
            f"{' '.join(f'{name}={value}' for name, value in given)} do not define a process: give "
            f"all three (HOST:PORT, the number of processes, and the index of this one from 0)."
        )
    port = coordinator.rpartition(":")[2]
    if not re.fullmatch(r".+:[0-9]{1,5}", coordinator) or not 0 < int(port) < 1 << 16:
        raise UserError(f"{names[0]}={coordinator} has no port from 1 to 65535: write HOST:PORT.")
    if process_id >= process_count:
        raise UserError(
            f"{names[2]}={process_id} is not below {names[1]}={process_count}: count from 0."
        )
