"""What --topology names, and devices of it that XLA can compile for without having them."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax

from moe_jax.errors import UserError
from moe_jax.registry import lookup
from moe_jax.tools.plan.chips import CHIPS, Chip

# libtpu asks the machine for a TPU unless it is told not to; and it logs that it found none.
_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is run: two plans may compile at once
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many devices of one kind."""

    name: str  # as asked for
    chip: Chip
    grid: tuple[int, ...]  # chips along each axis of the torus; one number for GPUs

    @property
    def num_chips(self) -> int:
        """Chips, which is what one pays for."""
        return math.prod(self.grid)

    @property
    def num_devices(self) -> int:
        """JAX devices."""
        return self.num_chips * self.chip.per_chip


def parse_topology(name: str) -> Topology:
    """`v5p:8x8x16`, `v5e:4x4`, `h200:8`; raises UserError for anything else."""
    chip, _, sizes = name.partition(":")
    known = lookup(CHIPS, chip, "--topology")
    axes = known.torus or 1
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) or sizes.count("x") != axes - 1:
        example = "x".join(["4"] * axes)
        raise UserError(f"--topology={name} is not a size of {chip}: write {chip}:{example}.")
    return Topology(name, known, tuple(int(size) for size in sizes.split("x")))


def compile_devices(topology: Topology) -> tuple[list[Any], str]:
    """Devices to compile for, and what they are; none, and why, where XLA cannot.

    TPUs come from libtpu, which needs none.  GPUs have to be in this machine: XLA picks kernels
    for them by running some.

    Raises:
      UserError: a slice of that shape does not exist.
    """
    if not topology.chip.torus:
        same = [d for d in _gpus() if topology.chip.kind in d.device_kind]
        if len(same) < topology.num_devices:
            return [], (
                f"XLA compiles for GPUs only where they are: {len(same)} of "
                f"{topology.num_devices} {topology.chip.kind} here"
            )
        return same[: topology.num_devices], f"compiled on this machine's {topology.chip.kind}"
    for key, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies  # after the environment it is read from

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
    except (ImportError, ModuleNotFoundError, FileNotFoundError):
        return [], "libtpu is not installed: pip install 'moe_jax[plan]'"
    except jax.errors.JaxRuntimeError as error:
        first = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"--topology={topology.name} is not a slice of TPUs ({first}).") from None
    return list(found.devices), "compiled for this topology by libtpu, which needs no TPU"


def _gpus() -> list[Any]:
    """GPUs of this machine, none of their memory reserved."""
    if importlib.util.find_spec("jax_plugins") is None:
        return []
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        return jax.devices("gpu")
    except RuntimeError:
        return []
