"""Every legal layout of a model on a topology, ranked by the analytic bound."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from moe_jax.config import Config
from moe_jax.errors import UserError
from moe_jax.files import formats
from moe_jax.nn.remat import REMAT
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.tools.plan.analytic import Memory, estimate
from moe_jax.tools.plan.lowering import Plan, make_plan, replan
from moe_jax.tools.plan.roofline import Roofline, roofline
from moe_jax.tools.plan.topology import Topology
from moe_jax.tools.plan.work import executed_flops, moved_bytes, traffic

TENSOR = (1, 2, 4, 8)  # more ways leave matrices too narrow for any chip's matrix unit


class Found(NamedTuple):
    """A layout that fits."""

    plan: Plan
    memory: Memory
    roof: Roofline

    @property
    def seconds_per_token(self) -> float:
        """What is ranked: the step without hidden communication, over its tokens."""
        return self.roof.exposed / self.plan.tokens


class Rejected(NamedTuple):
    """A layout that cannot be used, and why."""

    layout: str
    why: str
    needs: float = 0.0  # bytes, where memory is the reason


class Ranking(NamedTuple):
    """Fastest first."""

    found: list[Found]
    rejected: list[Rejected]


def anywhere(config: Config) -> Plan:
    """The model of a config without its mesh: on one device, where any batch is legal."""
    train = dataclasses.replace(config.train, accumulation=1)
    return make_plan(dataclasses.replace(config, mesh=MeshConfig(), train=train), 1)


def meshes(devices: int, experts: int, tensors: Iterable[int] = TENSOR) -> Iterator[MeshConfig]:
    """Every way to split `devices` over the mesh axes with up to `experts` ways over expert."""
    for tensor in tensors:
        if devices % tensor:
            continue
        for expert in divisors(devices // tensor):
            if expert > experts:
                break
            rest = devices // tensor // expert
            for fsdp in divisors(rest):
                yield MeshConfig(rest // fsdp, fsdp, expert, tensor)


def divisors(number: int) -> list[int]:
    """All divisors, smallest first."""
    return [n for n in range(1, number + 1) if number % n == 0]


def search(
    plan: Plan,
    topology: Topology,
    usable: float,
    batches: Iterable[int] = (),
    policies: Iterable[str] = tuple(REMAT),
    tensor: Iterable[int] = TENSOR,
) -> Ranking:
    """Rank meshes x remat policies x batch sizes; accumulation is the least that fits.

    Args:
      plan: the model (`anywhere`); its mesh, remat and accumulation do not matter.
      topology: what it runs on.
      usable: bytes of a device.
      batches: rows a step to try; none: the plan's own, half and twice that.
      policies: names of remat policies to try.
      tensor: ways to split over tensor to try.
    """
    rows = plan.config.train.batch_size
    found: list[Found] = []
    rejected: list[Rejected] = []
    experts = 1 if plan.config.model.dense else plan.config.model.moe.num_experts
    for mesh in meshes(topology.num_devices, experts, tensor):
        for batch in batches or (rows, rows // 2, 2 * rows):
            for remat in policies:
                one = _least_accumulation(plan, topology, usable, mesh, remat, batch)
                (found if isinstance(one, Found) else rejected).append(one)  # pyright: ignore
    return Ranking(sorted(found, key=lambda one: one.seconds_per_token), rejected)


def _least_accumulation(
    plan: Plan, topology: Topology, usable: float, mesh: MeshConfig, remat: str, batch: int
) -> Found | Rejected:
    """The layout with the fewest microbatches that fits."""
    layout = f"{mesh_text(mesh)}, remat {remat}, batch {batch:,}"
    accumulation, why, needs = 1, "", 0.0
    while accumulation * mesh.batch_shards <= batch or not why:
        try:
            variant = replan(plan, mesh, remat, batch, accumulation)
        except UserError as error:
            return Rejected(layout, why or str(error), needs)
        memory = estimate(variant)
        if memory.total <= usable:
            return Found(variant, memory, analytic_roofline(variant, topology))
        needs = memory.total
        why = f"needs {formats.size(memory.total, 1)} of {formats.size(usable, 1)} a device"
        accumulation *= 2
    return Rejected(layout, why, needs)


def analytic_roofline(plan: Plan, topology: Topology) -> Roofline:
    """The bound without a compiled program."""
    return roofline(plan, topology, executed_flops(plan), moved_bytes(plan), traffic(plan))


def mesh_text(mesh: MeshConfig) -> str:
    """A mesh as --mesh takes it, without axes of size 1."""
    sizes = dataclasses.asdict(mesh).items()
    return ",".join(f"{name}={size}" for name, size in sizes if size > 1) or "data=1"
