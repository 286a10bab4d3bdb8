"""Parses --topology, and makes devices of it for which XLA can compile without the hardware."""

import dataclasses
import importlib.util
import itertools
import math
import os
import re
from typing import Any

import jax

from moe_jax.errors import UserError
from moe_jax.registry import lookup
from moe_jax.tools.plan.chips import CHIPS, Chip

MOST_CHIPS = 1 << 20  # because a search tries every mesh of this number of chips

# By default libtpu looks for a TPU and logs that it found none.
_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing runs on a TPU, so two plans may compile at once
}
# Accelerator types of Cloud TPU, such as v5p-1024 and v5litepod-16, end in the number of either
# TensorCores or chips.  Generation -> TensorCores per chip, for types that count TensorCores.
_TENSOR_CORES = {"v2": 2, "v3": 2, "v4": 2, "v5p": 2}
_OTHER_NAMES = {"v5litepod": "v5e"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of devices of one kind, and the shape of their torus."""

    name: str  # the value of --topology
    chip: Chip
    grid: tuple[int, ...]  # chips along each axis of the torus; one number for GPUs

    @property
    def num_chips(self) -> int:
        """The number of chips, which decides the price."""
        return math.prod(self.grid)

    @property
    def num_devices(self) -> int:
        """The number of JAX devices."""
        return self.num_chips * self.chip.per_chip


def parse_topology(name: str) -> Topology:
    """Parse `v5p:8x8x16`, `v5e:4x4` or `h200:8`; raises UserError for anything else."""
    _refuse_accelerator_type(name)
    chip, _, sizes = name.partition(":")
    known = lookup(CHIPS, chip, "--topology")
    axes = known.torus or 1
    number = "[1-9][0-9]{0,5}"
    if not re.fullmatch(f"{number}(x{number})*", sizes) or sizes.count("x") != axes - 1:
        chips = int(sizes) if re.fullmatch(r"[1-9][0-9]{0,8}", sizes) else 0
        example = _slice_of(chips, known) or "x".join(["4"] * axes)
        raise UserError(f"--topology={name} is not a size of {chip}: write {chip}:{example}.")
    topology = Topology(name, known, tuple(int(size) for size in sizes.split("x")))
    if topology.num_chips > MOST_CHIPS:
        raise UserError(f"--topology={name} has more than {MOST_CHIPS:,} chips: give fewer.")
    return topology


def _refuse_accelerator_type(name: str) -> None:
    """Raise UserError for names such as v5p-1024, which may have several shapes."""
    found = re.fullmatch(r"([a-z0-9]+)-([1-9][0-9]{0,8})", name.lower())
    if found is None:
        return
    generation, number = found[1], int(found[2])
    if generation in _TENSOR_CORES and generation not in CHIPS:
        known = ", ".join(CHIPS)
        raise UserError(f"--topology={name}: {generation} is not known. Use one of {known}.")
    chip, cores = _OTHER_NAMES.get(generation, generation), _TENSOR_CORES.get(generation, 1)
    if chip not in CHIPS:
        return
    counted = f"{number} TensorCores, {cores} per chip" if cores > 1 else f"{number} chips"
    if number % cores:
        raise UserError(
            f"--topology={name} would be {counted}: write the shape of the torus, such as "
            f"{chip}:4x4x4."
        )
    shape = _slice_of(number // cores, CHIPS[chip])
    if not shape or CHIPS[chip].per_chip > 1:  # it is not defined what such a number counts
        example = "x".join(["4"] * (CHIPS[chip].torus or 1))
        raise UserError(
            f"--topology={name} does not define a slice of {chip}: write the shape of the torus, "
            f"such as {chip}:{example}."
        )
    raise UserError(f"--topology={name} means {counted}: write the shape, {chip}:{shape}.")


def _slice_of(chips: int, chip: Chip) -> str:
    """The slice of `chips` chips with the most equal sides, as 8x8x16; empty: there is none.

    Reference: the tables of shapes in chips.py's sources.  From 64 chips on, a slice of a 3-D torus
    consists of cubes of 4x4x4.
    """
    if not chip.torus or not chips or chips > chip.island:
        return str(chips) if chips and not chip.torus else ""
    if chip.torus == 3 and chips == 4:
        return "2x2x1"
    cubes = chip.torus == 3 and chips >= 64
    whole = (side for side in range(1, chips + 1) if chips % side == 0)
    sides = [side for side in whole if (side % 4 == 0 if cubes else side & (side - 1) == 0)]
    shapes = itertools.combinations_with_replacement(sides, chip.torus)
    legal = [shape for shape in shapes if math.prod(shape) == chips]
    return "x".join(map(str, min(legal, key=sum, default=())))


def compile_devices(topology: Topology) -> tuple[list[Any], str]:
    """Make devices to compile for, and describe them; no devices and a reason if XLA cannot.

    libtpu makes TPU devices without a TPU.  GPUs must be in this machine, because XLA chooses their
    kernels by running candidates.

    Raises:
      UserError: a slice of that shape does not exist.
    """
    if not topology.chip.torus:
        same = [d for d in _gpus() if topology.chip.kind in d.device_kind]
        if len(same) < topology.num_devices:
            return [], (
                f"XLA compiles only for GPUs of this machine, which has {len(same)} of "
                f"{topology.num_devices} {topology.chip.kind}"
            )
        return same[: topology.num_devices], f"compiled on this machine's {topology.chip.kind}"
    for key, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies  # reads the environment variables set above

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
    except (ImportError, ModuleNotFoundError, FileNotFoundError):
        return [], "libtpu is not installed: pip install 'moe_jax[plan]'"
    except jax.errors.JaxRuntimeError as error:
        first = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"--topology={topology.name} is not a slice of TPUs ({first}).") from None
    return list(found.devices), "compiled for this topology by libtpu, which needs no TPU"


def _gpus() -> list[Any]:
    """The GPUs of this machine, without reserving their memory."""
    if importlib.util.find_spec("jax_plugins") is None:
        return []
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        return jax.devices("gpu")
    except RuntimeError:
        return []
