"""Divides the time of a train step into parts, from a profiler trace.

Every kernel event names the HLO instruction that it runs.  The compiled program's text has the
`jax.named_scope` of each instruction, of the forward and of the backward pass.
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

STEPS = 3  # traced steps
# Scopes of the model, the loss and the step.  An instruction belongs to its innermost scope.
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
    """Milliseconds per step on the first device (on the CPU: the sum over all threads)."""

    parts: dict[str, float]  # by part; `collectives` is the time in which nothing else runs
    hidden_ms: float  # collectives that ran beside other kernels; in no part


def breakdown(run_steps: Callable[[int], Any], hlo: str) -> Breakdown:
    """Trace STEPS steps and divide their time into parts.

    Args:
      run_steps: runs the given number of steps and waits for them.
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
    """Add up (part, start, end): time by part, and of collectives hidden beside other kernels.

    With `on_device` the parts, idle time included, sum to the time from first start to last end.
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
    """Format the parts with their shares, the largest first."""
    total = sum(profile_ms.values())
    rows = [["part of the step", "ms", "share"]]
    rows += [[part, f"{ms:.2f}", f"{ms / total:.1%}"] for part, ms in profile_ms.items()]
    return table([*rows, ["all", f"{total:.2f}", "100.0%"]], left=1)


def instruction_parts(hlo: str) -> dict[str, str]:
    """Map the name of every instruction of a compiled program to its part of the step."""
    computations, _ = parse(hlo)
    return {one.name: _part(one) for body in computations.values() for one in body}


def _part(instruction: Instruction) -> str:
    if instruction.op.removesuffix("-start").removesuffix("-done") in COLLECTIVES:
        return COLLECTIVE
    # Example: jit(train_step)/transpose(jvp(jit(block)))/dispatch/experts/dot
    words = [word for word in re.split(r"[/()]", instruction.op_name) if word in SCOPES]
    return words[-1] if words else OTHER


def _device_plane(profile: Any) -> Any:
    """The plane of the first device; on the CPU the host's, whose threads run the program."""
    planes = sorted(profile.planes, key=lambda plane: plane.name)
    device = [plane for plane in planes if re.match(r"/device:(GPU|TPU)", plane.name)]
    return (device or [plane for plane in planes if plane.name.startswith("/host:CPU")])[0]


def _events(plane: Any, part_of: Mapping[str, str]) -> Iterator[tuple[str, float, float]]:
    """(part of the step, start, end in nanoseconds) of every kernel."""
    for line in plane.lines:
        if line.name in ("XLA Modules", "Steps", "Framework Ops", "Framework Name Scope"):
            continue
        for event in line.events:
            # NCCL's kernels name an instruction from before XLA's last passes.
            nccl = COLLECTIVE if event.name.startswith("nccl") else None
            part = part_of.get(dict(event.stats).get("hlo_op", event.name), nccl)
            if part is not None:
                yield part, event.start_ns, event.start_ns + event.duration_ns


def _union(spans: Iterable[tuple[float, float]]) -> list[list[float]]:
    """Merge overlapping spans; the result is sorted."""
    union: list[list[float]] = []
    for start, stop in sorted(spans):
        if union and start <= union[-1][1]:
            union[-1][1] = max(union[-1][1], stop)
        else:
            union.append([start, stop])
    return union


def _length(union: list[list[float]]) -> float:
    return sum(stop - start for start, stop in union)
