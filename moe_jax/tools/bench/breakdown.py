"""Where the time of a train step goes, from a profiler trace.

Every kernel's event names the HLO instruction it runs; the compiled program's text says in which
`jax.named_scope` that instruction was made, forward or backward.
"""

import collections
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moe_jax.files.formats import table
from moe_jax.tools.hlo import COLLECTIVES, Instruction, parse

STEPS = 3  # traced
# Scopes of the model, the loss and the step; the innermost one of an instruction counts.
SCOPES = (
    "embedding",
    "attention",
    "ffn",
    "router",
    "dispatch",
    "experts",
    "combine",
    "ledger",
    "cross_entropy",
    "optimizer",
)
OTHER, COLLECTIVE, IDLE = "other (norms, residuals)", "collectives", "idle"


class Breakdown(NamedTuple):
    """Milliseconds a step of the first device (on the CPU: of all threads together)."""

    parts: dict[str, float]  # of collectives, the time in which nothing else runs
    hidden_ms: float  # of collectives beside other kernels, which the parts do not hold


def breakdown(run_steps: Callable[[int], Any], hlo: str) -> Breakdown:
    """Where the time of a step goes.

    Args:
      run_steps: runs so many steps to their end.
      hlo: text of the compiled program.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run_steps(STEPS)
        (path,) = Path(folder).rglob("*.xplane.pb")
        plane = _device_plane(jax.profiler.ProfileData.from_file(str(path)))
        events = list(_events(plane, instruction_parts(hlo)))
    spent, hidden = account(events, on_device=plane.name.startswith("/device:"))
    per_step = {part: round(ns / STEPS / 1e6, 3) for part, ns in spent.items()}
    return Breakdown(dict(sorted(per_step.items(), key=_by_time)), round(hidden / STEPS / 1e6, 3))


def account(
    events: Sequence[tuple[str, float, float]], on_device: bool
) -> tuple[dict[str, float], float]:
    """Time by part, and that of collectives beside other kernels, from (part, start, end).

    On a device the parts, idle time among them, add up to the time from first to last.
    """
    total: dict[str, float] = collections.defaultdict(float)
    for part, start, stop in events:
        total[part] += stop - start
    if not on_device:
        return dict(total), 0.0
    busy = _union((start, stop) for part, start, stop in events if part != COLLECTIVE)
    either = _union((start, stop) for _, start, stop in events)
    collective, exposed = total.pop(COLLECTIVE, 0.0), _length(either) - _length(busy)
    total |= {COLLECTIVE: exposed} if collective else {}
    total[IDLE] = either[-1][1] - either[0][0] - _length(either)
    return dict(total), collective - exposed


def _by_time(item: tuple[str, float]) -> tuple[bool, float]:
    return item[0] == IDLE, -item[1]


def breakdown_table(profile_ms: Mapping[str, float]) -> str:
    """The parts with their shares, the largest first."""
    total = sum(profile_ms.values())
    rows = [["part of the step", "ms", "share"]]
    rows += [[part, f"{ms:.2f}", f"{ms / total:.1%}"] for part, ms in profile_ms.items()]
    return table([*rows, ["all", f"{total:.2f}", "100.0%"]], left=1)


def instruction_parts(hlo: str) -> dict[str, str]:
    """Part of the step of every instruction of a compiled program, by the instruction's name."""
    computations, _ = parse(hlo)
    return {one.name: _part(one) for body in computations.values() for one in body}


def _part(instruction: Instruction) -> str:
    if instruction.op.removesuffix("-start").removesuffix("-done") in COLLECTIVES:
        return COLLECTIVE
    # Scopes stand in a path such as jit(train_step)/transpose(jvp(jit(block)))/dispatch/experts/dot
    words = [word for word in re.split(r"[/()]", instruction.op_name) if word in SCOPES]
    return words[-1] if words else OTHER


def _device_plane(profile: Any) -> Any:
    """The first device's, or the host's where programs run on its threads."""
    planes = sorted(profile.planes, key=lambda plane: plane.name)
    device = [plane for plane in planes if re.match(r"/device:(GPU|TPU)", plane.name)]
    return (device or [plane for plane in planes if plane.name.startswith("/host:CPU")])[0]


def _events(plane: Any, part_of: Mapping[str, str]) -> Iterator[tuple[str, float, float]]:
    """(part of the step, start, end in nanoseconds) of every kernel."""
    for line in plane.lines:
        if line.name in ("XLA Modules", "Steps", "Framework Ops", "Framework Name Scope"):
            continue
        for event in line.events:
            # NCCL's kernels name an instruction of before XLA's last passes.
            nccl = COLLECTIVE if event.name.startswith("nccl") else None
            part = part_of.get(dict(event.stats).get("hlo_op", event.name), nccl)
            if part is not None:
                yield part, event.start_ns, event.start_ns + event.duration_ns


def _union(spans: Iterable[tuple[float, float]]) -> list[list[float]]:
    """The same time as spans that do not overlap, in order."""
    union: list[list[float]] = []
    for start, stop in sorted(spans):
        if union and start <= union[-1][1]:
            union[-1][1] = max(union[-1][1], stop)
        else:
            union.append([start, stop])
    return union


def _length(union: list[list[float]]) -> float:
    return sum(stop - start for start, stop in union)
