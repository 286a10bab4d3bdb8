"""What the matrix of test_conformance.py leaves out: who overflows, and a small receive buffer."""

import dataclasses
import math

import numpy as np
import pytest

from moe_jax.moe.config import PRIORITIES
from moe_jax.moe.dispatch import DISPATCH
from moe_jax.tools.doctor.conformance import cases
from moe_jax.tools.doctor.conformance.cases import E
from moe_jax.tools.doctor.conformance.compare import TOLERANCES, worst
from moe_jax.tools.doctor.conformance.oracle import expected
from moe_jax.tools.doctor.conformance.subject import compiled

BOUNDED = [name for name, path in DISPATCH.items() if path().capacity(8, 1, 2, True) is not None]


def layer(router: str, dispatch: str, mesh: str, **moe) -> cases.Layer:
    """A layer of the matrix with other knobs."""
    plain = cases.layer(router, dispatch, mesh, "float32", remat=False)
    changed = dataclasses.replace(plain.model.moe, **moe)
    return dataclasses.replace(plain, model=dataclasses.replace(plain.model, moe=changed))


def assert_agrees(layer: cases.Layer, keep=None) -> int:
    """In every scenario; returns how many assignments were dropped."""
    step, dropped = compiled(layer), 0
    for name, case in cases.scenarios(layer.model).items():
        right = expected(layer, case, keep)
        error = worst(step(case), right)
        assert error.relative <= TOLERANCES["cpu", "float32"], (name, error)
        fates = right.fates["total"]
        dropped += fates.dropped_capacity + fates.dropped_buffer
    return dropped


# `einsum` hands out slots by the code of `capacity`: by default it shows that once.
@pytest.mark.parametrize(
    ("dispatch", "priority"),
    [
        pytest.param(
            dispatch,
            priority,
            marks=[pytest.mark.full] if dispatch == "einsum" and priority != "token" else [],
        )
        for dispatch in BOUNDED
        for priority in PRIORITIES
    ],
)
def test_who_overflows(dispatch, priority):
    assert assert_agrees(layer("gshard", dispatch, "expert2_tensor2", priority=priority)) > 100


def fits_the_buffer(shards: int, factor: float):
    """Assignments that send buffers of 8 devices hold: the first of each destination, by expert."""

    def keep(wanted_GSK, ids_GSK):
        kept_N, ids_N, wanted_N = (a.reshape(-1) for a in (wanted_GSK & False, ids_GSK, wanted_GSK))
        for numbers in np.split(np.arange(ids_N.size), 8):
            room = math.ceil(len(numbers) * factor / shards)
            for shard in range(shards):
                mine = [n for n in numbers if wanted_N[n] and ids_N[n] // (E // shards) == shard]
                kept_N[sorted(mine, key=lambda n: (ids_N[n], n))[:room]] = True
        return kept_N.reshape(ids_GSK.shape)

    return keep


@pytest.mark.parametrize(("mesh", "shards"), [("expert8", 8), ("data2_expert4", 4)])
def test_a_small_receive_buffer_drops_and_counts_its_own_cause(mesh, shards):
    small = layer("gshard", "dropless", mesh, options={"dropless": {"recv_factor": 1.25}})
    assert assert_agrees(small, fits_the_buffer(shards, 1.25)) > 50
