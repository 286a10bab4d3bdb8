"""What the step guard compares a step with, and which steps it skips."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.sections import TrainConfig
from moe_jax.train.guard import MIN_ACCEPTED, WINDOW, first_guard, judge, next_guard
from moe_jax.train.state import TrainState, all_finite

FACTOR = 10.0


def run(losses, norms, factor=FACTOR):
    """(guard, skipped steps) after these steps."""
    guard, refused = first_guard(jnp.float32), []
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), 1):
        loss, norm = jnp.float32(loss), jnp.float32(norm)
        decision = judge(guard, loss, norm, factor)
        guard = next_guard(guard, decision, loss, norm, jnp.int32(step))
        if not decision.accepted:
            refused.append((step, "spike" if decision.spike else "not finite"))
    return {name: float(value) for name, value in guard.items()}, refused


def test_the_means_are_plain_at_first_and_forget_later():
    draw = np.random.default_rng(0)
    losses, norms = draw.uniform(1, 2, 3 * WINDOW), draw.uniform(3, 4, 3 * WINDOW)
    guard, refused = run(losses[:WINDOW], norms[:WINDOW])
    assert guard["loss"] == pytest.approx(losses[:WINDOW].mean(), rel=1e-5)
    assert guard["grad_norm"] == pytest.approx(norms[:WINDOW].mean(), rel=1e-5)
    assert not refused and guard["accepted"] == guard["changed"] == WINDOW
    mean = losses[:WINDOW].mean()
    for loss in losses[WINDOW:]:
        mean = (1 - 1 / WINDOW) * mean + loss / WINDOW
    assert run(losses, norms)[0]["loss"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("what", ["loss", "norm"])
def test_a_spike_is_refused_once_the_means_say_something(what):
    losses, norms = np.ones(MIN_ACCEPTED + 6), np.ones(MIN_ACCEPTED + 6)
    row = losses if what == "loss" else norms
    row[3] = 1000  # before MIN_ACCEPTED accepted steps: accepted, and part of the mean
    mean = (MIN_ACCEPTED - 1 + 1000) / MIN_ACCEPTED
    row[MIN_ACCEPTED] = 0.99 * FACTOR * mean
    row[MIN_ACCEPTED + 1 :] = [1e9, np.nan, np.inf, 1, 1]
    guard, refused = run(losses, norms)
    assert refused == [
        (MIN_ACCEPTED + 2, "spike"),
        (MIN_ACCEPTED + 3, "not finite"),
        (MIN_ACCEPTED + 4, "not finite"),
    ]
    assert (guard["spikes"], guard["not_finite"]) == (1, 2)
    assert guard["accepted"] == MIN_ACCEPTED + 3 and guard["changed"] == MIN_ACCEPTED + 6
    accepted = np.delete(row, [MIN_ACCEPTED + 1, MIN_ACCEPTED + 2, MIN_ACCEPTED + 3])
    mean_now = guard["loss" if what == "loss" else "grad_norm"]
    assert mean_now == pytest.approx(
        accepted.mean(), rel=1e-5
    )  # a skipped step does not change the means


def test_a_factor_of_0_refuses_only_what_is_not_finite():
    losses = np.ones(MIN_ACCEPTED + 2)
    losses[-2:] = 1e30, np.nan
    assert run(losses, np.ones(MIN_ACCEPTED + 2), 0.0)[1] == [(MIN_ACCEPTED + 2, "not finite")]


@pytest.mark.parametrize("bad", [None, np.nan, np.inf])
@pytest.mark.parametrize("where", ["params", "optimizer", "router"])
def test_a_state_that_is_not_finite_is_found(where, bad, mesh_of):
    parts = {name: {"a": np.ones(3, np.float32)} for name in ("params", "optimizer", "router")}
    if bad is not None:
        parts[where]["a"][1] = bad
    state = TrainState(
        np.int32(7), **parts, guard=first_guard(jnp.float32), fall=np.ones(2, np.float32)
    )
    assert all_finite(state, mesh_of(data=2)) == (bad is None)


@pytest.mark.parametrize("factor", [0.5, 1.0, -3.0])
def test_a_factor_that_would_refuse_everything_is_an_error(factor):
    with pytest.raises(UserError, match=r"train\.spike_factor"):
        TrainConfig(spike_factor=factor)
