"""What --topology names, and devices of it that XLA can compile for without having them."""

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

MOST_CHIPS = 1 << 20  # a search tries every mesh that their number allows

# libtpu asks the machine for a TPU unless it is told not to; and it logs that it found none.
_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is run: two plans may compile at once
}
# Accelerator types of Cloud TPU, such as v5p-1024 and v5litepod-16, end in a number of TensorCores
# or of chips.  Generation -> TensorCores per chip, where those are counted.
_TENSOR_CORES = {"v2": 2, "v3": 2, "v4": 2, "v5p": 2}
_OTHER_NAMES = {"v5litepod": "v5e"}


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
    """Raises UserError for names such as v5p-1024: one of them may have several shapes."""
    found = re.fullmatch(r"([a-z0-9]+)-([1-9][0-9]{0,8})", name.lower())
    if found is None:
        return
    generation, number = found[1], int(found[2])
    if generation in _TENSOR_CORES and generation not in CHIPS:
        known = ", ".join(CHIPS)
        raise UserError(f"--topology={name}: no figures of {generation} are known here ({known}).")
    chip, cores = _OTHER_NAMES.get(generation, generation), _TENSOR_CORES.get(generation, 1)
    if chip not in CHIPS:
        return
    counted = f"{number} TensorCores, {cores} a chip" if cores > 1 else f"{number} chips"
    if number % cores:
        raise UserError(
            f"--topology={name} would be {counted}: name the chips along the torus, such as "
            f"{chip}:4x4x4."
        )
    shape = _slice_of(number // cores, CHIPS[chip])
    if not shape or CHIPS[chip].per_chip > 1:  # what a number of those counts is not defined
        example = "x".join(["4"] * (CHIPS[chip].torus or 1))
        raise UserError(
            f"--topology={name} is not a slice of {chip} that can be told by its number: name the "
            f"chips along the torus, such as {chip}:{example}."
        )
    raise UserError(f"--topology={name} stands for {counted}: write their shape, {chip}:{shape}.")


def _slice_of(chips: int, chip: Chip) -> str:
    """The slice of so many chips with the most equal sides, as 8x8x16; empty where there is none.

    Reference: the tables of shapes in chips.py's sources.  From 64 chips on a slice of a 3-D torus
    is made of cubes of 4x4x4.
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
