"""Formats a plan as lines of text."""

from collections import defaultdict
from collections.abc import Iterator

from moe_jax.files import formats
from moe_jax.model.flops import param_counts
from moe_jax.tools.hlo import Collectives, mesh_axes
from moe_jax.tools.plan.analytic import Memory
from moe_jax.tools.plan.compiled import Compiled
from moe_jax.tools.plan.lowering import Plan
from moe_jax.tools.plan.roofline import Roofline, Traffic
from moe_jax.tools.plan.search import Found, Rejected, mesh_text
from moe_jax.tools.plan.topology import Topology
from moe_jax.train.state import checkpoint_bytes

_DAY = 86_400


def describe_plan(plan: Plan, topology: Topology) -> Iterator[str]:
    """Describe the topology, the model and the batch of a plan."""
    config = plan.config
    counts = param_counts(plan.model)
    rows, parts = config.train.batch_size, config.train.accumulation
    yield (
        f"{topology.name}: {topology.num_chips:,} chips, {topology.num_devices:,} devices "
        f"({topology.chip.kind}), mesh {config.mesh}"
    )
    yield (
        f"model: {counts.total:,} parameters, {counts.active:,} active, remat "
        f"{config.model.remat}, layers {'scanned' if config.model.scan_layers else 'unrolled'}"
    )
    yield (
        f"batch: {rows:,} rows of {config.data.sequence_length:,} tokens "
        f"({plan.tokens:,} tokens) in {parts} microbatch{'es' if parts > 1 else ''}"
    )
    yield from (f"note: {note}" for note in plan.notes)


def describe_memory(memory: Memory, compiled: Compiled | None, chip_bytes: float) -> Iterator[str]:
    """Describe the peak bytes of one device: analytic by purpose, and compiled in total."""
    yield "peak bytes per device (analytic):"
    for name, size in memory._asdict().items():
        yield f"  {name:<12} {formats.size(size):>10}"
    yield f"  {'total':<12} {formats.size(memory.total):>10} of {formats.size(chip_bytes)} usable"
    if compiled is not None:
        gap = memory.total / compiled.peak - 1
        yield (
            f"  {'compiled':<12} {formats.size(compiled.peak):>10} (state and batch "
            f"{formats.size(compiled.arguments)}); the analytic total is {gap:+.1%}"
        )


def describe_traffic(found: list[Traffic], how: str) -> Iterator[str]:
    """Describe the bytes that one device sends per step."""
    yield f"collectives, bytes sent per device and step ({how}){':' if found else ': none'}"
    sums: dict[tuple[str, str], float] = defaultdict(float)
    for one in found:
        sums[one.op, one.axes] += one.bytes
    for op in ("all-to-all", "all-gather", "reduce-scatter", "all-reduce", "collective-permute"):
        total = sum(size for (name, _), size in sums.items() if name == op)
        if not total:
            continue
        parts = sorted(((size, axes) for (name, axes), size in sums.items() if name == op))
        over = ", ".join(f"{formats.size(size)} over {axes}" for size, axes in reversed(parts))
        yield f"  {op:<18} {formats.size(total):>10}  ({over})"


def read_traffic(collectives: Collectives, plan: Plan) -> list[Traffic]:
    """Compute the traffic of a compiled program's collectives."""
    shape, devices = dict(plan.mesh.shape), plan.mesh.size
    return [
        Traffic(one.op, mesh_axes(one.group, shape), one.sent(devices)) for one in collectives.found
    ]


def describe_speed(
    plan: Plan, topology: Topology, roof: Roofline, executed: float, budget: float
) -> Iterator[str]:
    """Describe step time, rates and costs, all of which are bounds."""
    yield (
        f"FLOPs per step: {plan.flops * plan.tokens:.4g} of the model, "
        f"{executed * topology.num_devices:.4g} executed (with recomputation and empty slots)"
    )
    busy = ", ".join(f"{name} {1e3 * s:,.1f} ms" for name, s in roof.limits.items())
    yield f"roofline: {1e3 * roof.seconds:,.1f} ms per step, limited by {roof.limit} ({busy})"
    yield (
        f"MFU bound: {roof.mfu(roof.seconds):.1%}, and {roof.mfu(roof.exposed):.1%} "
        f"({1e3 * roof.exposed:,.1f} ms) if no communication is hidden"
    )
    disk = checkpoint_bytes(plan.model, plan.optimizer)
    yield f"checkpoint: {formats.size(disk)}"
    rate = plan.tokens / roof.seconds
    yield f"tokens per day, at most: {rate * _DAY:.4g}"
    hours = budget / rate / 3600 * topology.num_chips
    yield f"chip-hours for {budget:.3g} tokens, at least: {hours:,.0f}"


def describe_found(found: Found) -> str:
    """Describe one layout of a search."""
    config, roof = found.plan.config, found.roof
    return (
        f"{mesh_text(config.mesh)}, remat {config.model.remat}, batch {config.train.batch_size:,} "
        f"in {config.train.accumulation}: {formats.size(found.memory.total)}, "
        f"{1e3 * roof.exposed:,.1f} ms, "
        f"{roof.mfu(roof.exposed):.1%} to {roof.mfu(roof.seconds):.1%} MFU, "
        f"limited by {roof.limit}"
    )


def describe_rejected(rejected: list[Rejected]) -> Iterator[str]:
    """Describe why each layout was rejected; layouts that need least memory come last."""
    for one in sorted(rejected, key=lambda one: (one.needs > 0, -one.needs)):
        yield f"rejected: {one.layout}: {one.why}"
