"""Scales one model from 8 to 65,536 chips: the best layout at each size, and its bottleneck."""

from collections.abc import Iterator

from moe_jax.config import Config
from moe_jax.files import formats
from moe_jax.tools.plan.search import Found, mesh_text, plan_on_one_device, search
from moe_jax.tools.plan.topology import Topology, parse_topology

LARGEST_BATCH = 32 * 2**20  # tokens per step; more is marked impractical
_CHIPS = tuple(2**n for n in range(3, 17))


def scaling(config: Config, chip: str, usable: float) -> Iterator[str]:
    """Make a Markdown table: per number of chips and size of axis `tensor`, the best layout.

    The batch is the config's own, or the smallest legal one if that is larger: one row for each
    part of the batch.  All figures are analytic.

    Args:
      config: the model.
      chip: key of CHIPS.
      usable: bytes of a device that a program may use.
    """
    yield (
        "| chips | mesh | remat, microbatches | smallest legal batch, tokens | batch, tokens | "
        "GiB per device | full overlap, ms | no overlap, ms | MFU between | limit | note |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    plan = plan_on_one_device(config)
    for chips in _CHIPS:
        topology = parse_topology(f"{chip}:{'x'.join(map(str, cube(chips)))}")
        rows = plan.config.train.batch_size
        best: dict[int, Found] = {}
        reasons: dict[int, str] = {}
        for tensor in (1, 2, 4, 8):
            # At least one row for every device that splits the batch.
            batch = max(rows, chips // tensor)
            ranking = search(plan, topology, usable, batches=(batch,), tensor=(tensor,))
            if ranking.found:
                best[tensor] = ranking.found[0]
            elif ranking.rejected:
                reasons[tensor] = min(ranking.rejected, key=lambda one: one.needs).why
        practical = (found for found in best.values() if smallest_batch(found) <= LARGEST_BATCH)
        fastest = min(practical, key=lambda one: one.seconds_per_token, default=None)
        for found in best.values():
            yield _row(chips, topology, found, found is fastest)
        for tensor, why in reasons.items():
            yield f"| {chips:,} | tensor={tensor} | - | - | - | - | - | - | - | HBM | {why} |"


def cube(chips: int) -> tuple[int, int, int]:
    """The most equal sides of a torus of `chips` chips, which is a power of two."""
    exponent = chips.bit_length() - 1
    sides = [2 ** ((exponent + extra) // 3) for extra in range(3)]
    return sides[0], sides[1], sides[2]


def smallest_batch(found: Found) -> int:
    """The tokens per step if every part of the batch is one row."""
    return found.plan.config.mesh.batch_shards * found.plan.config.data.sequence_length


def num_slices(topology: Topology) -> int:
    """The smallest number of equal slices, none larger than the largest that exists."""
    devices = topology.num_devices
    least = -(-devices // topology.chip.island)
    return next(n for n in range(least, devices + 1) if devices % n == 0)


def _row(chips: int, topology: Topology, found: Found, fastest: bool) -> str:
    plan, roof = found.plan, found.roof
    config = plan.config
    smallest = smallest_batch(found)
    slowest = max(roof.links, key=lambda axes: roof.links[axes], default="")
    limit = roof.limit if roof.limit != "compute" else f"compute, then {slowest or 'HBM'}"
    notes = ["impractical: over 32M tokens per batch"] if smallest > LARGEST_BATCH else []
    notes += ["best"] if fastest else []
    slices = num_slices(topology)
    notes += [f"{slices} slices"] * (slices > 1)
    return (
        f"| {chips:,} | {mesh_text(config.mesh)} | {config.model.remat}, "
        f"{config.train.accumulation} | {smallest:,} | {plan.tokens:,} | "
        f"{formats.gib(found.memory.total)} | {1e3 * roof.seconds:,.0f} | "
        f"{1e3 * roof.exposed:,.0f} | {roof.mfu(roof.exposed):.0%} to {roof.mfu(roof.seconds):.0%} "
        f"| {limit} | {'; '.join(notes)} |"
    )
