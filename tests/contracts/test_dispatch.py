"""Every router x dispatch path x mesh against the dense oracle, in float64: values, gradients."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from layer_cases import (
    MESHES,
    ROWS,
    SCENARIOS,
    STEERED,
    TOKENS,
    E,
    assert_agrees,
    assert_close,
    assert_counts,
    compiled_layer,
    layer_config,
    mesh,
    numpy_capacity,
    numpy_kept,
    numpy_output,
    oracle,
    pairwise,
    wanted,
)

from moe_jax.model.moe.config import PRIORITIES
from moe_jax.model.moe.dispatch import DISPATCH
from moe_jax.model.moe.dispatch.capacity import Capacity
from moe_jax.model.moe.dispatch.dropless import Dropless

pytestmark = pytest.mark.usefixtures("x64")

BOUNDED = [name for name, path in DISPATCH.items() if path().capacity(8, 1, 2, True) is not None]
ROOMY = 100.0  # a capacity factor at which nothing can be dropped
TIGHT = 1.0


@pytest.mark.parametrize("router", STEERED)
def test_the_oracle_is_the_plain_sum_over_experts(router):
    for name, case in SCENARIOS.items():
        result = oracle(router)(case)
        expected = numpy_output(case, result.choice, wanted(case, result.choice))
        assert_close(result.y_BTD, expected, name)


def test_the_scenarios_are_what_they_are_called():
    def load(name, k=None):
        choice = oracle("top_k")(SCENARIOS[name]).choice
        return np.bincount(choice.ids_GSK[..., :k].reshape(-1), minlength=E)

    assert set(load("even")) == {TOKENS * 3}
    assert load("skewed").max() > 4 * load("skewed").min()
    assert list(load("empty_experts") == 0) == [False, False, *[True] * 4, False, False]
    assert list(load("one_expert", 1) > 0) == [e == 5 for e in range(E)]


@pytest.mark.parametrize(("router", "dispatch", "where"), pairwise(STEERED, DISPATCH, MESHES))
def test_nothing_dropped(router, dispatch, where):
    layer = compiled_layer(layer_config(router, dispatch, capacity_factor=ROOMY), mesh(where))
    for case in SCENARIOS.values():
        found, expected = layer(case), oracle(router)(case)
        assert_agrees(found, expected)
        everything = wanted(case, expected.choice)
        assert_counts(found, case, expected.choice, everything, "dropped_capacity")
        assert not found.y_BTD[~case.mask_BT].any()


@pytest.mark.parametrize(
    ("router", "dispatch", "priority", "where"),
    pairwise(STEERED, BOUNDED, PRIORITIES, MESHES),
)
def test_capacity_overflow(router, dispatch, priority, where):
    config = layer_config(router, dispatch, capacity_factor=TIGHT, priority=priority)
    layer = compiled_layer(config, mesh(where))
    dropped = 0
    for case in SCENARIOS.values():
        choice = oracle(router)(case).choice
        slots = numpy_capacity(TOKENS, choice.ids_GSK.shape[2], TIGHT, E)
        sampled = wanted(case, choice)
        kept = numpy_kept(sampled, choice, ROWS, slots, priority, E)
        found = layer(case)
        assert_close(found.y_BTD, numpy_output(case, choice, kept), "output")
        assert_agrees(found, oracle(router)(case, kept))
        assert_counts(found, case, choice, kept, "dropped_capacity")
        dropped += int(found.aux.stats.fates.dropped_capacity)
    assert dropped > 100  # the scenarios do overflow


def _fits_the_buffer(sampled_GSK, ids_GSK, devices: int, shards: int, factor: float):
    """Assignments that a device's send buffers hold: the first of each destination, by expert."""
    kept = np.zeros(ids_GSK.size, bool)
    for numbers in np.split(np.arange(ids_GSK.size), devices):
        room = math.ceil(len(numbers) * factor / shards)
        ids = ids_GSK.reshape(-1)
        for shard in range(shards):
            mine = [n for n in numbers if sampled_GSK.flat[n] and ids[n] // (E // shards) == shard]
            kept[sorted(mine, key=lambda n: (ids[n], n))[:room]] = True
    return kept.reshape(ids_GSK.shape)


@pytest.mark.parametrize("where", ["expert8", "data2_expert4"])
def test_a_small_receive_buffer_drops_and_counts_its_own_cause(where):
    options = {"dropless": {"recv_factor": 1.25}}
    layer = compiled_layer(layer_config("gshard", "dropless", options=options), mesh(where))
    dropped = 0
    for case in SCENARIOS.values():
        choice = oracle("gshard")(case).choice
        sampled = wanted(case, choice)
        shards = MESHES[where]["expert"]
        kept = _fits_the_buffer(sampled, choice.ids_GSK, 8, shards, 1.25)
        found = layer(case)
        assert_agrees(found, oracle("gshard")(case, kept))
        assert_counts(found, case, choice, kept, "dropped_buffer")
        dropped += int(found.aux.stats.fates.dropped_buffer)
    assert dropped > 50


@dataclasses.dataclass(frozen=True)
class KeepsTheSort(Dropless):
    """Gives tokens back in another order than they came."""

    def __call__(self, x_GSD, choice, experts, inputs):
        y_GSD, stats = super().__call__(x_GSD, choice, experts, inputs)
        return jax.numpy.roll(y_GSD, 1, axis=1), stats


@dataclasses.dataclass(frozen=True)
class SwapsExperts(Capacity):
    """Sends expert 0's tokens to expert 1 and the other way round."""

    def __call__(self, x_GSD, choice, experts, inputs):
        swap_E = jax.numpy.arange(E).at[:2].set(jax.numpy.array([1, 0]))
        swapped = choice._replace(ids_GSK=swap_E[choice.ids_GSK])
        return super().__call__(x_GSD, swapped, experts, inputs)


@dataclasses.dataclass(frozen=True)
class ForgetsAGradient(Capacity):
    """The right output, but one expert learns nothing."""

    def __call__(self, x_GSD, choice, experts, inputs):
        w_out = experts.w_out_EFD
        frozen = dataclasses.replace(
            experts, w_out_EFD=w_out.at[3].set(jax.lax.stop_gradient(w_out[3]))
        )
        return super().__call__(x_GSD, choice, frozen, inputs)


@dataclasses.dataclass(frozen=True)
class LosesTheRouterGradient(Capacity):
    """The right output, but the weights carry no gradient to the router."""

    def __call__(self, x_GSD, choice, experts, inputs):
        return super().__call__(x_GSD, jax.lax.stop_gradient(choice), experts, inputs)


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (KeepsTheSort, "output"),
        (SwapsExperts, "output"),
        (ForgetsAGradient, "gradient of w_out_EFD, expert 3"),
        (LosesTheRouterGradient, "gradient of the tokens"),
    ],
)
def test_the_comparison_fails_on_a_broken_path(broken, complaint, monkeypatch):
    monkeypatch.setitem(DISPATCH, "broken", broken)
    config = layer_config("top_k", "broken", capacity_factor=ROOMY)
    layer = compiled_layer(config, mesh("one_device"))
    case = SCENARIOS["skewed"]
    with pytest.raises(AssertionError, match=complaint):
        assert_agrees(layer(case), oracle("top_k")(case))
