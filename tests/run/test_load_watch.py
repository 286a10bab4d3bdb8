"""The lines about routers that collapse, and the moving mean of the load violation."""

import numpy as np
import pytest

from moe_jax.run.load_watch import DECAY, FIRST_STEP, LoadWatch

EVEN = np.full(64, 10)
COLLAPSED = np.where(np.arange(64) < 4, 150, 1)  # 4 of 64 experts get nearly everything


def watch(loads, choices=2, first=1):
    lines: list[str] = []
    follower = LoadWatch(choices, lines.append)
    for step, load_LE in enumerate(loads, first):
        follower.saw(step, np.array(load_LE))
    return follower, lines


def test_a_collapsed_layer_is_named_once_and_its_recovery_too():
    bad, good = [[EVEN, COLLAPSED]] * (FIRST_STEP + 50), [[EVEN, EVEN]] * 150
    _, lines = watch([*bad, *good])
    assert len(lines) == 2
    ratio = COLLAPSED.max() / COLLAPSED.mean()
    share = COLLAPSED / COLLAPSED.sum()
    effective = np.exp(-(share * np.log(share)).sum())
    assert f"step {FIRST_STEP}: the router of MoE layer 1 has collapsed" in lines[0]
    assert f"gets {ratio:.1f} times the mean load, {effective:.0f} of 64 experts" in lines[0]
    assert "model.moe.balance_weight" in lines[0]
    assert "MoE layer 1 has recovered" in lines[1]


def test_a_short_imbalance_and_the_first_steps_are_no_collapse():
    early = [[COLLAPSED]] * (FIRST_STEP - 60) + [[EVEN]] * 300
    short = [[COLLAPSED]] * 8 + [[EVEN]] * 50
    _, lines = watch([*early, *short])
    assert lines == []


def test_few_experts_collapse_at_three_quarters_of_the_largest_load():
    one_of_eight = np.array([800, 0, 0, 0, 0, 0, 0, 0])  # K = 4: at most twice the mean
    even_two = np.array([400, 400, 400, 400, 0, 0, 0, 0])
    assert watch([[one_of_eight]] * (FIRST_STEP + 1), choices=4)[1]
    assert watch([[even_two]] * (FIRST_STEP + 1), choices=4)[1]
    mild = np.array([130, 110, 100, 100, 100, 100, 90, 70])
    assert not watch([[mild]] * (FIRST_STEP + 1), choices=4)[1]


def test_the_mean_is_that_of_the_worst_layer():
    follower, _ = watch([[EVEN, COLLAPSED], [EVEN, EVEN]])
    ratio = COLLAPSED.max() / COLLAPSED.mean()
    weights = np.array([DECAY, 1.0])
    expected = (weights * [ratio, 1.0]).sum() / weights.sum() - 1
    assert follower.violation() == pytest.approx(expected)
    assert LoadWatch(1, print).violation() == 0
