"""Reads the collectives and scatters out of compiled and lowered programs."""

import itertools
import re
from typing import NamedTuple

import numpy as np

from moe_jax.tools.hlo import parse, replica_groups


class Collective(NamedTuple):
    """One collective of a compiled program."""

    op: str
    shape: tuple[int, ...]  # of its (first) result on one device
    floating: bool
    groups: np.ndarray  # [groups, devices]


def collectives(compiled_text: str) -> list[Collective]:
    """The all-gathers and all-to-alls of a compiled program."""
    found = []
    for instruction in itertools.chain(*parse(compiled_text)[0].values()):
        op = instruction.op.removesuffix("-start")
        if op in ("all-gather", "all-to-all"):
            result = re.search(r"(\w+)\[([\d,]*)\]", instruction.type)
            assert result is not None
            groups = replica_groups(instruction.rest)
            found.append(Collective(op, tuple(_numbers(result[2])), result[1][0] in "fb", groups))
    return found


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def floating_scatters(lowered_text: str) -> list[tuple[int, ...]]:
    """The shapes of floating-point scatters in a lowered StableHLO program."""
    shapes = []
    # The types of a scatter follow the region that combines two values.
    for body in lowered_text.split('"stablehlo.scatter"(')[1:]:
        result = re.search(r"\) -> \(?tensor<((?:\d+x)*)(\w+)>", body[body.index("}) :") :])
        assert result is not None
        if result[2][0] in "fb":
            shapes.append(tuple(_numbers(result[1])))
    return shapes
