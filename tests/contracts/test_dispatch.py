"""Cases beyond the matrix of test_conformance.py: which assignments overflow slots and buffers."""

import dataclasses
import itertools
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
    """A layer of the matrix with different knobs."""
    plain = cases.layer(router, dispatch, mesh, "float32", remat=False)
    changed = dataclasses.replace(plain.model.moe, **moe)
    return dataclasses.replace(plain, model=dataclasses.replace(plain.model, moe=changed))


def assert_agrees(layer: cases.Layer, keep=None) -> int:
    """Assert agreement with the oracle in every scenario; return the number of drops."""
    step, dropped = compiled(layer), 0
    for name, case in cases.scenarios(layer.model).items():
        right = expected(layer, case, keep)
        error = worst(step(case), right)
        assert error.relative <= TOLERANCES["cpu", "float32"], (name, error)
        outcomes = right.outcomes["total"]
        dropped += outcomes.dropped_capacity + outcomes.dropped_buffer
    return dropped


# `einsum` orders assignments by the code of `capacity`, so by default one priority is enough.
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
    """The oracle's `keep` for send buffers of 8 devices, filled by position, row, then choice.

    The rows of a device are consecutive, independent of the routing groups.
    """

    def keep(wanted_GSK, ids_GSK):
        K = ids_GSK.shape[2]
        wanted, ids = (a.reshape(8, -1, cases.T, K) for a in (wanted_GSK, ids_GSK))
        kept = np.zeros_like(wanted)
        rows = wanted.shape[1]
        room = math.ceil(rows * cases.T * K * factor / shards)
        for device in range(8):
            sent = [0] * shards
            for t, r, k in itertools.product(range(cases.T), range(rows), range(K)):
                shard = ids[device, r, t, k] // (E // shards)
                if wanted[device, r, t, k] and sent[shard] < room:
                    kept[device, r, t, k] = True
                    sent[shard] += 1
        return kept.reshape(ids_GSK.shape)

    return keep


@pytest.mark.parametrize(
    ("mesh", "shards"),
    [
        pytest.param("expert8", 8, marks=pytest.mark.lifecycle),
        ("data2_expert4", 4),
    ],
)
def test_a_small_receive_buffer_drops_and_counts_its_own_cause(mesh, shards):
    small = layer("gshard", "dropless", mesh, options={"dropless": {"recv_factor": 1.25}})
    assert assert_agrees(small, fits_the_buffer(shards, 1.25)) > 50
