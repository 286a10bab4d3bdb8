"""How the processes of a run start, stop and tell their launcher what to do next."""

import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence

import jax

# As exchange.py has it: jax.process_index() would start the backends, which may not be there.
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

from moe_jax.errors import UserError
from moe_jax.parallel.coordinator import bind_address, chosen_by_user

DONE = 0  # exit code: finished, or stopped by a person's STOP file
FIX = 1  # something a person must fix
DIVERGED = 3  # the loss is gone; running again would lose it again
AGAIN = 42  # run the same command again: preempted, the watchdog fired, or a peer is gone
INTERRUPTED = 130  # Ctrl-C, as shells have it
# What gloo's collectives, NCCL's and JAX's coordination service say of a process that is gone.
_LOST = (
    *("Gloo", "Connection closed by peer", "Connection reset by peer"),
    *("remote process exited", "CoordinationServiceError"),
)

# Twins of --coordinator, --process_count and --process_id, set by launchers.
VARIABLES = ("MOE_JAX_COORDINATOR", "MOE_JAX_PROCESS_COUNT", "MOE_JAX_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
_ALONE = "pass --process_count=1 for one process."


def start(
    coordinator: str = "", process_count: int = 0, process_id: int = -1, heartbeat: int = 100
) -> None:
    """Joins the processes of a run; must come before anything that touches a device.

    The first of these that says anything decides: the three arguments, the environment variables
    `VARIABLES` (Kubernetes, a shell loop), several tasks under Slurm's
    srun, several TPU hosts (TPU VM pods, GKE).  `process_count=1` alone means one process whatever
    the environment says.

    Args:
      coordinator: HOST:PORT of process 0, reachable by all.
      process_count: how many processes.
      process_id: which one this is, from 0.
      heartbeat: seconds without a sign of life from one process after which JAX aborts the others.

    Where the others do not come within five minutes JAX ends the process with SIGABRT (134).

    Raises:
      UserError: some of the three are missing or impossible, or the environment is half there.
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
        # Left alone, JAX gives each of Slurm's tasks one GPU, also where a node has one task.
        one_a_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0] == "1"
        jax.distributed.initialize(
            local_device_ids=[] if one_a_node else None, heartbeat_timeout_seconds=heartbeat
        )


def _bind(coordinator: str) -> str | None:
    """Where process 0 listens; None: on all addresses, or as the user has told JAX."""
    if chosen_by_user():
        return None
    address = bind_address(coordinator)
    if address is None:
        print(
            f"the coordinator listens on all addresses of this host: {coordinator} is not one "
            f"address of it",
            flush=True,
        )
    return address


def detect(environment: Mapping[str, str]) -> bool:
    """Whether Slurm or TPU hosts ask for several processes; raises UserError if half there."""
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
        return False  # a TPU host may run on its CPU, alone
    # Cloud TPU and GKE name the hosts of a pod here; jax prefers the first of the two.
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    if "," in hosts and "TPU_WORKER_ID" not in environment:
        raise UserError(
            f"TPU_WORKER_HOSTNAMES lists several hosts but TPU_WORKER_ID is not set: set it, or "
            f"{_ALONE}"
        )
    if not hosts:
        _refuse_nameless_pod(environment)
    # jax sets TPU_ML_PLATFORM where it finds TPU chips; there it can ask the metadata server,
    # unless told not to.
    can_ask = "TPU_ML_PLATFORM" in environment and "TPU_SKIP_MDS_QUERY" not in environment
    return "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in environment or can_ask


def _refuse_nameless_pod(environment: Mapping[str, str]) -> None:
    """Pods of one indexed job would each train alone, into one workdir."""
    if "JOB_COMPLETION_INDEX" in environment:
        raise UserError(
            f"This pod has an index (JOB_COMPLETION_INDEX) but {VARIABLES[0]} is not set: set "
            f"{', '.join(VARIABLES)} in its manifest, or {_ALONE}"
        )


def lost_peer(error: BaseException) -> bool:
    """Whether `error` says that another process of this run is gone, not what is wrong here.

    A collective over gloo raises as soon as the connection ends; JAX's coordination service says
    so to whoever waits at a barrier.  (A process that waits elsewhere is aborted with 134.)
    """
    chain: BaseException | None = error
    texts = []
    while chain is not None:  # Orbax wraps what a collective of its own raises
        texts.append(str(chain))
        chain = chain.__cause__
    said = any(word in text for text in texts for word in _LOST)
    return said and jax.distributed.is_initialized()


def exit_code(error: BaseException) -> int:
    """The code with which a command ends the process after `error`."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return AGAIN if not isinstance(error, UserError) and lost_peer(error) else FIX


def lead() -> bool:
    """Whether this process is the one that writes and prints; touches no device."""
    return global_state.process_id == 0


class Preemption:
    """Notices SIGTERM; ask `reached` once every step, on every process.  Make it after `start`.

    One process: our handler sets a flag; before `defer` there is no step to wait for, and it ends
    the process with AGAIN at once.  Several: jax.distributed catches the signal and all processes
    agree on one step to stop at; a handler of ours would silently disable that.
    """

    def __init__(self):
        self._several = jax.distributed.is_initialized()
        self._asked = self._deferred = False
        # None: nothing to give back.
        self._before = None if self._several else signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: object) -> None:
        if not self._deferred:
            # Not an exception: unwinding from the middle of a compilation crashes the interpreter.
            sys.stdout.flush()
            os._exit(AGAIN)
        self._asked = True

    def defer(self) -> None:
        """From now on there is state to save: SIGTERM waits for the end of a step."""
        self._deferred = True

    def reached(self, step: int) -> bool:
        """Whether to save and exit with AGAIN after `step`; true on exactly one step if several."""
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def close(self) -> None:
        """Gives SIGTERM back to whoever had it."""
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
            f"{' '.join(f'{name}={value}' for name, value in given)} do not make a process: give "
            f"all three, HOST:PORT, the number of processes and this one's index from 0."
        )
    port = coordinator.rpartition(":")[2]
    if not re.fullmatch(r".+:[0-9]{1,5}", coordinator) or not 0 < int(port) < 1 << 16:
        raise UserError(f"{names[0]}={coordinator} has no port from 1 to 65535: write HOST:PORT.")
    if process_id >= process_count:
        raise UserError(
            f"{names[2]}={process_id} is not below {names[1]}={process_count}: count from 0."
        )
