"""Ranks every legal layout of a model on a topology by the analytic bound."""

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

TENSOR = (1, 2, 4, 8)  # with more, matrices are too narrow for any chip's matrix unit


class Found(NamedTuple):
    """A layout that fits."""

    plan: Plan
    memory: Memory
    roof: Roofline

    @property
    def seconds_per_token(self) -> float:
        """The ranking key: seconds of a step without hidden communication, per token."""
        return self.roof.exposed / self.plan.tokens


class Rejected(NamedTuple):
    """A layout that cannot be used, and why."""

    layout: str
    why: str
    needs: float = 0.0  # bytes that it needs; 0: memory is not the reason


class Ranking(NamedTuple):
    """The layouts of a search, fastest first."""

    found: list[Found]
    rejected: list[Rejected]


def plan_on_one_device(config: Config) -> Plan:
    """Plan the model of a config on one device, where any batch is legal."""
    train = dataclasses.replace(config.train, accumulation=1)
    return make_plan(dataclasses.replace(config, mesh=MeshConfig(), train=train), 1)


def meshes(devices: int, experts: int, tensors: Iterable[int] = TENSOR) -> Iterator[MeshConfig]:
    """List all meshes of `devices` devices whose axis `expert` is at most `experts`.

    Args:
      devices: product of the axes.
      experts: largest size of axis `expert`.
      tensors: sizes of axis `tensor` to try.
    """
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
    """List all divisors, smallest first."""
    return [n for n in range(1, number + 1) if number % n == 0]


def search(
    plan: Plan,
    topology: Topology,
    usable: float,
    batches: Iterable[int] = (),
    policies: Iterable[str] = tuple(REMAT),
    tensor: Iterable[int] = TENSOR,
) -> Ranking:
    """Rank meshes x remat policies x batch sizes, each with the least accumulation that fits.

    Args:
      plan: the model (`plan_on_one_device`); its mesh, remat and accumulation do not matter.
      topology: the devices.
      usable: bytes of a device that a program may use.
      batches: rows per step to try; empty: the plan's own, half and twice that.
      policies: names of remat policies to try.
      tensor: sizes of axis `tensor` to try.
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
    """Find the fewest microbatches with which the layout fits."""
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
        why = f"needs {formats.size(memory.total, 1)} of {formats.size(usable, 1)} per device"
        accumulation *= 2
    return Rejected(layout, why, needs)


def analytic_roofline(plan: Plan, topology: Topology) -> Roofline:
    """Compute the roofline bound without compiling the program."""
    return roofline(plan, topology, executed_flops(plan), moved_bytes(plan), traffic(plan))


def mesh_text(mesh: MeshConfig) -> str:
    """Format a mesh as --mesh takes it, without axes of size 1."""
    sizes = dataclasses.asdict(mesh).items()
    return ",".join(f"{name}={size}" for name, size in sizes if size > 1) or "data=1"
