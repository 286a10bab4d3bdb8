"""Lists all combinations (cells), and a subset of them that covers every pair of values."""

import collections
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from moe_jax.moe.dispatch import DISPATCH
from moe_jax.moe.routers import ROUTERS
from moe_jax.tools.doctor.conformance.cases import MESHES

DTYPES = ("float32", "bfloat16")


class Cell(NamedTuple):
    """One combination, which runs every scenario; its name has the fields in this order."""

    router: str
    dispatch: str
    mesh: str
    dtype: str
    remat: bool

    @property
    def devices(self) -> int:
        """The number of devices that it needs."""
        sizes = MESHES[self.mesh]
        return sizes.batch_shards * sizes.tensor

    def __str__(self) -> str:
        remat = "remat" if self.remat else "no remat"
        return f"{self.router} {self.dispatch} {self.mesh} {self.dtype} {remat}"


def all_cells() -> list[Cell]:
    """List all combinations."""
    return [
        Cell(*values)
        for values in itertools.product(ROUTERS, DISPATCH, MESHES, DTYPES, (False, True))
    ]


def pairwise(cells: Sequence[Cell]) -> list[Cell]:
    """Choose a small subset of `cells` that covers every pair of values (greedy).

    Each step takes the cell with the most uncovered pairs, and among equals the one whose pairs are
    covered least often.
    """
    pairs = {cell: set(itertools.combinations(enumerate(cell), 2)) for cell in cells}
    seen = collections.Counter()
    chosen, missing = [], set().union(*pairs.values())

    def gain(cell):
        return len(pairs[cell] & missing), -sum(seen[pair] for pair in pairs[cell])

    while missing:
        best = max(cells, key=gain)
        chosen.append(best)
        missing -= pairs[best]
        seen.update(pairs[best])
    return chosen
