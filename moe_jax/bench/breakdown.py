"""Where the time of a train step goes, from a profiler trace.

Every kernel's event names the HLO instruction it runs; the compiled program's text says in which
`jax.named_scope` that instruction was made, forward or backward.
"""

import collections
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from moe_jax.markdown import table

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
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
OTHER, COLLECTIVE, IDLE = "other (norms, residuals)", "collectives", "idle"
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = .*?\s([a-z][\w-]*)\(", re.M)
_OP_NAME = re.compile(r'op_name="([^"]*)"')


def breakdown(run_steps: Callable[[int], Any], hlo: str) -> dict[str, float]:
    """Milliseconds a step by part, of the first device (on the CPU: of all threads together).

    Args:
      run_steps: runs so many steps to their end.
      hlo: text of the compiled program.
    """
    part_of = instruction_parts(hlo)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run_steps(STEPS)
        (path,) = Path(folder).rglob("*.xplane.pb")
        plane = _device_plane(jax.profiler.ProfileData.from_file(str(path)))
        total: dict[str, float] = collections.defaultdict(float)
        spans = []
        for name, start, duration in _events(plane, part_of):
            total[part_of[name]] += duration
            spans.append((start, start + duration))
    if plane.name.startswith("/device:"):
        total[IDLE] = _idle(spans)
    return {part: round(ns / STEPS / 1e6, 3) for part, ns in sorted(total.items(), key=_by_time)}


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
    parts = {}
    for line in hlo.splitlines():
        found = _INSTRUCTION.match(line)
        if found:
            name, opcode = found.groups()
            op_name = _OP_NAME.search(line)
            parts[name] = _part(opcode, op_name[1] if op_name else "")
    return parts


def _part(opcode: str, op_name: str) -> str:
    if opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES:
        return COLLECTIVE
    # A scope stands in a path such as jit(train_step)/transpose(jvp(dispatch))/experts/dot.
    words = [word for word in re.split(r"[/()]", op_name) if word in SCOPES]
    return words[-1] if words else OTHER


def _device_plane(profile: Any) -> Any:
    """The first device's, or the host's where programs run on its threads."""
    planes = sorted(profile.planes, key=lambda plane: plane.name)
    device = [plane for plane in planes if re.match(r"/device:(GPU|TPU)", plane.name)]
    return (device or [plane for plane in planes if plane.name.startswith("/host:CPU")])[0]


def _events(plane: Any, part_of: Mapping[str, str]) -> Iterator[tuple[str, float, float]]:
    """(instruction, start, nanoseconds) of every kernel."""
    for line in plane.lines:
        if line.name in ("XLA Modules", "Steps", "Framework Ops", "Framework Name Scope"):
            continue
        for event in line.events:
            name = dict(event.stats).get("hlo_op", event.name)
            if name in part_of:
                yield name, event.start_ns, event.duration_ns


def _idle(spans: list[tuple[float, float]]) -> float:
    """Nanoseconds between the first kernel and the last in which none ran."""
    idle, end = 0.0, min(spans)[0]
    for start, stop in sorted(spans):
        idle += max(0.0, start - end)
        end = max(end, stop)
    return idle
