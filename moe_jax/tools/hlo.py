"""Reads the text of a compiled program: its instructions, and the bytes of its collectives.

A loop's body counts once per iteration; XLA writes the trip count into the text.  Bytes are those
that one of n devices sends in an optimal algorithm: (n-1)/n of the whole array for an all-gather, a
reduce-scatter or an all-to-all, twice that for an all-reduce (reduce, then gather).
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)"
)
_CALLED_LISTS = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    type: str
    op: str
    rest: str  # operands and attributes

    @property
    def op_name(self) -> str:
        """Its named scopes and its primitive, such as `jit(f)/dispatch/dot_general`."""
        found = _OP_NAME.search(self.rest)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction."""

    op: str
    bytes: float  # size of the whole gathered, reduced or exchanged array on one device
    group: tuple[int, ...]  # devices of the first group; empty: all devices
    times: int  # executions per step

    def sent(self, devices: int) -> float:
        """The bytes per step that one device sends in a program over `devices` devices."""
        n = len(self.group) or devices
        if self.op == "collective-permute":
            return self.bytes * self.times
        share = (n - 1) / n * (2 if self.op == "all-reduce" else 1)
        return share * self.bytes * self.times


class Collectives(NamedTuple):
    """All of a program's collectives."""

    found: list[Collective]
    unknown_loops: int  # loops of unknown trip count, counted as one iteration


def read_collectives(text: str) -> Collectives:
    """Find every collective of a compiled module, with the number of executions per step."""
    computations, entry = parse(text)
    times, unknown = _times(computations, entry)
    found = []
    for name, count in times.items():
        # On TPUs a fused reduce-scatter is an all-reduce of which each device keeps its slice.
        scatters = "all-reduce-scatter" in name
        for instruction in computations[name]:
            op = instruction.op.removesuffix("-start")
            if op not in COLLECTIVES:
                continue
            group = _first_group(instruction.rest)
            size = _moved(op, instruction, len(group))
            if scatters and op == "all-reduce":
                op = "reduce-scatter"
            found.append(Collective(op, size, group, count))
    return Collectives(found, unknown)


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Parse the text into instructions by computation, and the name of the entry computation."""
    computations: dict[str, list[Instruction]] = {}
    entry, inside = "", None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if head:
            inside = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line == "}":
            inside = None
        elif inside is not None and " = " in line:
            inside.append(_instruction(line))
    return computations, entry


def _instruction(line: str) -> Instruction:
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    op, _, operands = rest[end:].strip().partition("(")
    return Instruction(name.removeprefix("%"), rest[:end], op, operands)


def _closing(text: str) -> int:
    """The position after the parenthesis that closes the first character of `text`."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return position + 1
    return len(text)


def _times(computations: dict[str, list[Instruction]], entry: str) -> tuple[Counter[str], int]:
    """Count executions per step of each computation, and the loops of unknown trip count."""
    edges: dict[str, Counter[str]] = {}
    unknown = 0
    for name, instructions in computations.items():
        called = edges[name] = Counter()
        for instruction in instructions:
            if instruction.op.endswith(("-update", "-done")):
                continue  # repeats the called computation of its -start instruction
            trips = 1
            if instruction.op == "while":
                trips = _trip_count(instruction, computations)
                unknown += trips == 0
            for target in _called(instruction.rest):
                called[target] += trips or 1
    times = Counter({entry: 1})
    for name in _callers_first(edges, entry):
        for target, count in edges[name].items():
            times[target] += times[name] * count
    return times, unknown


def _called(rest: str) -> Iterator[str]:
    yield from _CALLED.findall(rest)
    for names in _CALLED_LISTS.findall(rest):
        yield from re.findall(r"[\w.-]+", names)


def _callers_first(edges: dict[str, Counter[str]], entry: str) -> list[str]:
    """The computations reached from `entry`, each after all of its callers."""
    order: list[str] = []
    seen: set[str] = set()
    stack = [(entry, False)]
    while stack:
        name, left = stack.pop()
        if left:
            order.append(name)
        elif name not in seen and name in edges:
            seen.add(name)
            stack.append((name, True))
            stack.extend((target, False) for target in edges[name])
    return order[::-1]


def _trip_count(loop: Instruction, computations: dict[str, list[Instruction]]) -> int:
    """The trip count of a while loop; 0: neither XLA's text nor the loop condition gives it."""
    if known := _TRIPS.search(loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", loop.rest)
    body = computations.get(condition[1], []) if condition else []
    limits = [i.rest for i in body if i.op == "constant" and i.type.startswith("s32[]")]
    compared = any(i.op == "compare" and "direction=LT" in i.rest for i in body)
    if compared and len(limits) == 1:
        return int(limits[0].partition(")")[0])
    return 0


def _moved(op: str, instruction: Instruction, group: int) -> float:
    """The bytes of the whole array of a collective."""
    result = instruction.type
    if instruction.op.endswith("-start") and result.startswith("("):
        result = _last_element(result, op)
    size = array_bytes(result)
    return size * group if op == "reduce-scatter" else size


def _last_element(text: str, op: str) -> str:
    """The result inside the type of an asynchronous start: (operands, results, contexts...)."""
    if op == "all-reduce" and not text.startswith("(("):
        return text  # except on GPUs, all-reduce-start has the type of the result
    parts, depth, begin = [], 0, 1
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if (character == "," and depth == 1) or depth == 0:
            parts.append(text[begin:position])
            begin = position + 1
    return parts[1] if len(parts) > 1 else text


def array_bytes(text: str) -> float:
    """The bytes of all arrays in a type."""
    total = 0.0
    for dtype, dims in _ARRAY.findall(text):
        bits = _BITS.get(dtype) or int(re.sub(r"\D.*", "", dtype[1:]))
        total += bits / 8 * np.prod([int(n) for n in dims.split(",") if n], dtype=float)
    return total


def _first_group(rest: str) -> tuple[int, ...]:
    if "source_target_pairs" in rest or "replica_groups={}" in rest:
        return ()
    return tuple(int(n) for n in replica_groups(rest)[0])


def replica_groups(line: str) -> np.ndarray:
    """The replica groups of a collective, [groups, devices], in any of XLA's three notations."""
    if match := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        return np.array([_numbers(group) for group in match[1].split("},{")])
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return _iota(match[2], match[3]).reshape(_numbers(match[1]))
    if match := re.search(r"replica_groups=mesh\[(.*?)\](.*?) \{(.*?)\}", line):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        sizes = [int(n) for n in axes.values()]
        ids = re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", match[2])
        grid = (_iota(*ids.groups()) if ids else np.arange(np.prod(sizes))).reshape(sizes)
        inside = [list(axes).index(name) for name in re.findall(r"'(\w+)'", match[3])]
        last = np.moveaxis(grid, inside, range(-len(inside), 0))
        return last.reshape(-1, int(np.prod([sizes[i] for i in inside])))
    raise ValueError(f"replica groups in an unknown notation: {line[:300]}")


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _iota(dims: str, order: str | None) -> np.ndarray:
    ids = np.arange(np.prod(_numbers(dims))).reshape(_numbers(dims))
    return ids.transpose(_numbers(order)) if order else ids


def mesh_axes(group: Sequence[int], shape: dict[str, int]) -> str:
    """The mesh axes that a group of partitions spans, such as "fsdp" or "data x fsdp"."""
    if not group:
        return " x ".join(axis for axis, size in shape.items() if size > 1)
    places = np.array(np.unravel_index(list(group), tuple(shape.values())))
    varies = [len(set(row)) > 1 for row in places]
    return " x ".join(axis for axis, one in zip(shape, varies, strict=True) if one)
