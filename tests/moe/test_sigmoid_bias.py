"""Sigmoid routing with a bias against NumPy in float64; the bias must not change weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from router_cases import (
    SCOPES,
    D,
    E,
    G,
    R,
    S,
    assert_aux,
    central_difference,
    inputs,
    kernel,
    logits_inputs,
    numpy_balance,
    route_all,
    worth,
)

from moe_jax.errors import UserError
from moe_jax.moe.routers.sigmoid_bias import SigmoidBias

pytestmark = pytest.mark.usefixtures("x64")

BIAS_E = np.array([0.3, -0.2, 0.0, 0.4, -0.1, -0.3], np.float32)


def route(router, given, kernel_DE, bias_E=BIAS_E):
    """The router's (choice, aux)."""
    return route_all(router, given, {"kernel": kernel_DE}, {"bias": jnp.asarray(bias_E)})


def numpy_ids(scores, bias, router: SigmoidBias):
    """The experts that one token chooses, by sorting groups and experts in full."""
    biased, size = scores + bias, E // router.expert_groups
    best = [np.sort(biased[n * size : (n + 1) * size])[-2:].sum() for n in range(E // size)]
    stay = np.argsort(-np.array(best), kind="stable")[: router.top_groups]
    allowed = [e for e in range(E) if e // size in stay]
    return sorted(allowed, key=lambda e: -biased[e])[: router.top_k]


@pytest.mark.parametrize(
    ("router", "scope"),
    [
        (SigmoidBias(num_experts=E), "group"),
        (SigmoidBias(num_experts=E, top_k=3, routed_scale=2.5), "global"),
        (SigmoidBias(num_experts=E, expert_groups=3, top_groups=2, top_k=3), "row"),
        (SigmoidBias(num_experts=E, expert_groups=2, top_k=3, renormalize=False), "group"),
        (SigmoidBias(num_experts=E, expert_groups=6, top_groups=2), "row"),
    ],
)
def test_choices_weights_and_losses(router, scope):
    router = dataclasses.replace(router, balance_scope=scope)
    given = inputs()
    mask = np.asarray(given.mask_GS)
    choice, aux = route(router, given, kernel())
    logits = np.asarray(given.x_GSD) @ np.asarray(kernel())
    scores = 1 / (1 + np.exp(-logits))
    ids = np.array([[numpy_ids(s, BIAS_E, router) for s in group] for group in scores])
    weights = np.take_along_axis(scores, ids, -1)
    if router.renormalize:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    probs = scores / scores.sum(-1, keepdims=True)

    assert router.choices_per_token == router.top_k
    np.testing.assert_array_equal(choice.ids_GSK, ids)
    np.testing.assert_allclose(choice.weights_GSK, router.routed_scale * weights, rtol=1e-12)
    assert choice.valid_GSK.all()
    assert_aux(aux, mask, numpy_balance(probs, ids, mask, scope), logits, probs)


@pytest.mark.parametrize("scope", SCOPES)
def test_balance_is_one_when_balanced(scope):
    """The loss is 1; with sigmoids that are not normalised it would be E times their mean."""
    logits = 3.0 * np.eye(E) + 2.0 * np.roll(np.eye(E), 1, 1)
    x_GSD = jnp.zeros((G, S, D)).at[..., :E].set(np.tile(logits, (R, 1)))
    given = dataclasses.replace(inputs(padded=False), x_GSD=x_GSD)
    router = SigmoidBias(num_experts=E, balance_scope=scope)
    _, aux = route(router, given, jnp.eye(D, E), np.zeros(E, np.float32))
    np.testing.assert_allclose(aux.balance.value(), 1, rtol=1e-12)


# The bias


def test_the_bias_selects_and_does_not_weigh():
    """Scores are 1/2, 1/4, 1/5; a bias makes expert 2 the first choice, with weight 2/7."""
    odds = np.array([[1, 1 / 3, 1 / 4]])
    given, router = logits_inputs(np.log(odds)), SigmoidBias(num_experts=3)
    for bias, ids, weights in (
        ([0, 0, 0], [0, 1], [2 / 3, 1 / 3]),
        ([0, 0, 0.4], [2, 0], [2 / 7, 5 / 7]),
        ([7, 7, 7.4], [2, 0], [2 / 7, 5 / 7]),  # only differences between biases matter
    ):
        choice, aux = route(router, given, jnp.eye(3), np.array(bias, np.float32))
        assert choice.ids_GSK[0, 0].tolist() == ids
        np.testing.assert_allclose(choice.weights_GSK[0, 0], weights, rtol=1e-12)
        np.testing.assert_allclose(
            aux.entropy.value(),
            -sum(p * np.log(p) for p in np.array([10, 5, 4]) / 19),
            rtol=1e-12,
        )


def test_the_bias_has_no_gradient():
    given = inputs()

    def loss(state):
        choice, aux = route_all(SigmoidBias(num_experts=E), given, {"kernel": kernel()}, state)
        return worth(choice, jnp.arange(1.0, E + 1)) + aux.balance.value()

    np.testing.assert_array_equal(jax.grad(loss)({"bias": jnp.asarray(BIAS_E)})["bias"], 0)


def test_next_state_by_hand():
    """The bias moves by the rate towards the mean, at any distance; without load it does not."""
    state = {"bias": jnp.array([[0.5, 0, -0.5], [0.1, 0.2, 0.3], [0, 0, 0]], jnp.float32)}
    load_LE = jnp.array([[900, 2, 301], [0, 0, 0], [7, 7, 7]], jnp.int32)  # means 401, 0, 7
    after = SigmoidBias(num_experts=3, update_rate=0.125).next_state(state, load_LE)
    expected = [[0.375, 0.125, -0.375], [0.1, 0.2, 0.3], [0, 0, 0]]
    assert after["bias"].dtype == jnp.float32
    np.testing.assert_allclose(after["bias"], expected, rtol=1e-7)


def test_following_the_load_balances():
    """With the update in a loop, a router that favours two experts ends with a balanced load."""
    router = SigmoidBias(num_experts=E, update_rate=0.01)
    given = inputs(padded=False)
    skewed = kernel().at[:, :2].add(2 * given.x_GSD.reshape(-1, D).mean(0)[:, None])
    bias = jnp.zeros((1, E), jnp.float32)
    share = []
    for _ in range(150):
        choice, _ = route(router, given, skewed, bias[0])
        load_E = np.bincount(np.ravel(choice.ids_GSK), minlength=E)
        share.append(load_E.max() / load_E.mean())
        bias = router.next_state({"bias": bias}, jnp.asarray(load_E[None]))["bias"]
    assert share[0] > 1.3 and min(share) < 1.1


# Groups of experts


@pytest.mark.parametrize(
    ("scores", "bias", "ids"),
    [
        # Best two: 1.0, 1.15, 0.6.  The best single expert is not in the best group.
        ([0.9, 0.1, 0.55, 0.6, 0.3, 0.3], 0.0, [3, 2]),
        # All scores are below zero, so an excluded expert with score 0 would win.
        ([0.9, 0.1, 0.55, 0.6, 0.3, 0.3], -2.0, [3, 2]),
        ([0.9, 0.3, 0.55, 0.6, 0.3, 0.3], 0.0, [0, 1]),
    ],
)
def test_the_best_group_by_hand(scores, bias, ids):
    scores = np.array([scores])
    router = SigmoidBias(num_experts=6, expert_groups=3, top_groups=1)
    given = logits_inputs(np.log(scores / (1 - scores)))
    choice, _ = route(router, given, jnp.eye(6), np.full(6, bias, np.float32))
    assert choice.ids_GSK[0, 0].tolist() == ids


# Gradients


@pytest.mark.parametrize("options", [{}, {"renormalize": False, "top_k": 1}])
def test_the_output_moves_the_router(options):
    """Gradients equal central differences."""
    router, given = SigmoidBias(num_experts=E, **options), inputs()

    def output(kernel_DE):
        return worth(route(router, given, kernel_DE)[0], jnp.arange(1.0, E + 1))

    gradient = jax.grad(output)(kernel())
    difference = central_difference(output, kernel(), (2, 3))
    np.testing.assert_allclose(gradient[2, 3], difference, rtol=1e-5)
    assert jnp.abs(gradient).max() > 0.1


@pytest.mark.parametrize("logit", [-45.0, -200.0])
def test_vanishing_scores_leave_no_nan(logit):
    """In float32 the sigmoid s of -200 is 0; 1 / s^2 overflows at logits much closer to 0."""
    given = logits_inputs(np.full((1, 4), logit))
    given = dataclasses.replace(given, x_GSD=given.x_GSD.astype(jnp.float32))

    def loss(kernel_DE):
        choice, aux = route(SigmoidBias(num_experts=4), given, kernel_DE, np.zeros(4, np.float32))
        return worth(choice, jnp.arange(1.0, 5)) + aux.balance.value(), choice.weights_GSK

    (value, weights), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.eye(4, dtype="float32"))
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all() and gradient.any()
    np.testing.assert_allclose(weights, 0.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_groups": 4}, "expert_groups is 4: set a divisor"),
        ({"expert_groups": 0}, "expert_groups is 0"),
        ({"top_groups": 2}, "top_groups is 2"),
        ({"top_groups": 0}, "top_groups is 0"),
        ({"expert_groups": 3, "top_k": 3}, "fewer than top_k"),
        ({"top_k": 1}, "no gradient"),
        ({"routed_scale": 0.0}, "routed_scale"),
        ({"update_rate": -1e-3}, "update_rate"),
        ({"logit_cap": -1.0}, "logit_cap"),
        ({"jitter": 1.0}, "jitter"),
    ],
)
def test_knobs_that_cannot_work_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        SigmoidBias(**{"num_experts": E, **options})
