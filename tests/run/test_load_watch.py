"""The lines about routers that collapse and recover."""

import numpy as np

from moe_jax.run.load_watch import FIRST_STEP, LoadWatch

EVEN = np.full(64, 10)
COLLAPSED = np.where(np.arange(64) < 4, 150, 1)  # 4 of 64 experts get nearly everything
# The busiest expert gets 6 times the mean, and half of the experts are effective: Switch learns so.
PEAKED = np.concatenate([[384], np.full(31, 64), np.full(32, 2)])


def watch(loads, choices=2):
    lines: list[str] = []
    follower = LoadWatch(choices, lines.append)
    for step, load_LE in enumerate(loads, 1):
        follower.saw(step, np.array(load_LE))
    return lines


def test_a_collapsed_layer_is_named_once_and_its_recovery_too():
    bad, good = [[EVEN, COLLAPSED]] * (FIRST_STEP + 50), [[EVEN, EVEN]] * 150
    lines = watch([*bad, *good])
    assert len(lines) == 2
    ratio = COLLAPSED.max() / COLLAPSED.mean()
    share = COLLAPSED / COLLAPSED.sum()
    effective = np.exp(-(share * np.log(share)).sum())
    assert f"step {FIRST_STEP}: the router of MoE layer 1 has collapsed" in lines[0]
    assert f"{effective:.0f} of 64 experts are effective, the busiest gets {ratio:.1f}" in lines[0]
    assert "Raise model.moe.balance_weight." in lines[0] and "first_dense" not in lines[0]
    assert "MoE layer 1 has recovered" in lines[1]


def test_the_first_layer_can_be_made_dense():
    [line] = watch([[COLLAPSED, EVEN]] * FIRST_STEP)
    assert "Make this layer dense (model.moe.first_dense), or raise" in line


def test_an_early_or_short_collapse_and_one_busy_expert_are_no_collapse():
    """Healthy runs with sigmoid_bias look collapsed for 150 steps."""
    early = [[COLLAPSED]] * (FIRST_STEP - 60) + [[EVEN]] * 300
    short = [[COLLAPSED]] * 8 + [[PEAKED]] * 100
    lines = watch([*early, *short])
    assert lines == []


def test_all_experts_for_every_token_are_no_collapse():
    assert not watch([[EVEN]] * (FIRST_STEP + 1), choices=64)
