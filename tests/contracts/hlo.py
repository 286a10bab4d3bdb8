"""Reads the collectives and scatters out of compiled and lowered programs."""

import re
from typing import NamedTuple

import numpy as np


class Collective(NamedTuple):
    """One collective of a compiled program."""

    op: str
    shape: tuple[int, ...]  # of its (first) result on one device
    floating: bool
    groups: np.ndarray  # [groups, devices]


def collectives(compiled_text: str) -> list[Collective]:
    """All-gathers and all-to-alls of a compiled program."""
    found = []
    for line in compiled_text.splitlines():
        match = re.search(r" = \(?(\w+)\[([\d,]*)\].* (all-gather|all-to-all)(?:-start)?\(", line)
        if match:
            dtype, shape, op = match.groups()
            size = tuple(int(n) for n in shape.split(",") if n)
            found.append(Collective(op, size, dtype[0] in "fb", _groups(line)))
    return found


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _iota(dims: str, order: str | None) -> np.ndarray:
    ids = np.arange(np.prod(_numbers(dims))).reshape(_numbers(dims))
    return ids.transpose(_numbers(order)) if order else ids


def _groups(line: str) -> np.ndarray:
    """Replica groups in each of the three notations of XLA."""
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
    raise AssertionError(f"replica groups of a form this test does not know: {line[:300]}")


def floating_scatters(lowered_text: str) -> list[tuple[int, ...]]:
    """Shapes of the scatters of floating-point values in a lowered StableHLO program."""
    shapes = []
    # A scatter's types stand after the region that combines two values.
    for body in lowered_text.split('"stablehlo.scatter"(')[1:]:
        result = re.search(r"\) -> \(?tensor<((?:\d+x)*)(\w+)>", body[body.index("}) :") :])
        assert result is not None
        if result[2][0] in "fb":
            shapes.append(tuple(_numbers(result[1])))
    return shapes
