"""Computes a lower bound of the step time: the time of the busiest of compute, HBM and links.

The bound assumes that every resource runs at its peak rate and that all overlap, so a real step
takes longer.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from moe_jax.parallel.mesh import AXES
from moe_jax.tools.plan.chips import Chip
from moe_jax.tools.plan.lowering import Plan
from moe_jax.tools.plan.topology import Topology


class Traffic(NamedTuple):
    """The bytes that one device sends per step over some mesh axes with one kind of collective."""

    op: str
    axes: str  # such as "fsdp" or "data x fsdp"
    bytes: float


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The seconds per step that each resource of a device is busy."""

    compute: float
    memory: float
    links: Mapping[str, float]  # by mesh axes
    model_flops: float  # of one device
    peak_flops: float

    @property
    def limits(self) -> dict[str, float]:
        """The busy seconds of every resource, by name."""
        return {"compute": self.compute, "HBM": self.memory, **self.links}

    @property
    def limit(self) -> str:
        """The busiest resource."""
        return max(self.limits, key=lambda name: self.limits[name])

    @property
    def seconds(self) -> float:
        """The lower bound of the step time: the time of the busiest resource."""
        return self.limits[self.limit]

    @property
    def exposed(self) -> float:
        """The seconds of a step without overlap of communication and computation."""
        return max(self.compute, self.memory) + sum(self.links.values())

    def mfu(self, seconds: float) -> float:
        """The model FLOPs utilisation (MFU) of a step that takes `seconds`."""
        return self.model_flops / self.peak_flops / seconds


def roofline(
    plan: Plan, topology: Topology, executed_flops: float, moved: float, traffic: Iterable[Traffic]
) -> Roofline:
    """Compute the bound for one device.

    Args:
      plan: model and mesh.
      topology: chips and their links.
      executed_flops: FLOPs per step of one device, with recomputation and empty slots.
      moved: bytes per step between one device and its HBM.
      traffic: bytes per step that one device sends.
    """
    chip, links = topology.chip, defaultdict(float)
    sizes = dataclasses.asdict(plan.config.mesh)
    for one in traffic:
        links[one.axes] += _seconds(one, sizes, topology)
    return Roofline(
        executed_flops / chip.peak_flops,
        moved / chip.hbm_bandwidth,
        dict(links),
        plan.flops * plan.tokens / topology.num_devices,
        chip.peak_flops,
    )


def _seconds(traffic: Traffic, sizes: Mapping[str, int], topology: Topology) -> float:
    """The seconds that `traffic` takes on the links."""
    chip = topology.chip
    axes = [axis for axis in AXES if axis in traffic.axes.split(" x ")]
    devices = math.prod(sizes[axis] for axis in axes)
    inside, outside = _reach(axes, sizes, chip)
    seconds = 0.0
    if outside > 1:  # each device of an island sends its share of the traffic between islands
        share = 1 - 1 / outside if traffic.op == "all-to-all" else 1 / inside
        seconds = share * traffic.bytes / chip.network
    if inside == 1 or devices == 1:
        return seconds
    if not chip.torus:
        return max(seconds, traffic.bytes / chip.link)
    rings = torus_rings(sizes, topology)
    sides = [side for axis in axes for side in rings[axis]] or [inside]
    sides = sides[: chip.torus]
    if traffic.op == "all-to-all":
        # On a ring of s devices the average path is s/4 links, and there are two directions.
        return max(seconds, traffic.bytes * max(sides) / 8 / chip.link)
    return max(seconds, traffic.bytes / (2 * len(sides) * chip.link))


def _reach(axes: list[str], sizes: Mapping[str, int], chip: Chip) -> tuple[int, int]:
    """(Devices of a group on one island, islands that the group spans); inner axes come first."""
    inner, inside, outside = 1, 1, 1
    for axis in reversed(AXES):
        size = sizes[axis]
        room = max(1, chip.island // inner)
        fit = max(n for n in range(1, size + 1) if size % n == 0 and n <= room)
        if axis in axes:
            inside *= fit
            outside *= -(-size // fit)
        inner *= size
    return inside, outside


def torus_rings(sizes: Mapping[str, int], topology: Topology) -> dict[str, list[int]]:
    """Assign sides of the torus to mesh axes, inner axes first; whole sides where they fit."""
    free = list(topology.grid)
    rings: dict[str, list[int]] = {}
    for axis in reversed(AXES):
        rings[axis] = []
        left = sizes[axis]
        for side in sorted(free, key=lambda side: (left % side != 0, -side)):
            part = math.gcd(left, side)
            if part > 1:
                rings[axis].append(part)
                free[free.index(side)] = side // part
                left //= part
    return rings
