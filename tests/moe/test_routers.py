"""Each router against a NumPy implementation in float64, and known faults of routers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from router_cases import (
    D,
    E,
    G,
    R,
    S,
    T,
    inputs,
    kernel,
    numpy_balance,
    route_all,
    same_rows_in_other_groups,
    softmax,
)

from moe_jax.errors import UserError
from moe_jax.moe.balance import balance_loss, router_aux
from moe_jax.moe.routers.gshard import GShard
from moe_jax.moe.routers.linear import top_choices
from moe_jax.moe.routers.switch import Switch
from moe_jax.moe.routers.top_k import TopK
from moe_jax.moe.types import Mean, RouterIn

# (router, K, renormalised, assignments per token that its balance loss counts)
ROUTERS = {
    "switch": (Switch(jitter=0.0), 1, False, 1),
    "gshard": (GShard(random_second=False), 2, True, 1),
    "top_2": (TopK(top_k=2), 2, True, 2),
    "top_4_share": (TopK(top_k=4, renormalize=False), 4, False, 4),
}

pytestmark = pytest.mark.usefixtures("x64")


def route(router, given: RouterIn, kernel_DE):
    """The (choice, aux) of a router whose only parameter is its kernel."""
    return route_all(router, given, {"kernel": kernel_DE}, {})


def numpy_route(given: RouterIn, kernel_DE, choices, renormalize):
    """Compute (logits, probabilities, ids, weights) by a full sort."""
    logits = np.asarray(given.x_GSD) @ np.asarray(kernel_DE)
    probs = softmax(logits)
    ids = np.argsort(-probs, axis=-1, kind="stable")[..., :choices]
    weights = np.take_along_axis(probs, ids, -1)
    return logits, probs, ids, weights / weights.sum(-1, keepdims=True) if renormalize else weights


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("scope", ["group", "row", "global"])
def test_choices_weights_and_losses(name, scope):
    router, K, renormalize, counted = ROUTERS[name]
    router = dataclasses.replace(router, balance_scope=scope)
    given, mask = inputs(), np.asarray(inputs().mask_GS)
    choice, aux = route(router, given, kernel())
    logits, probs, ids, weights = numpy_route(given, kernel(), K, renormalize)

    assert router.choices_per_token == K
    np.testing.assert_array_equal(choice.ids_GSK, ids)
    np.testing.assert_allclose(choice.weights_GSK, weights, rtol=1e-12)
    assert choice.valid_GSK.all()

    z = np.log(np.exp(logits).sum(-1)) ** 2
    entropy = -(probs * np.log(probs)).sum(-1)
    for found, (total, count) in (
        (aux.balance, numpy_balance(probs, ids[..., :counted], mask, scope)),
        (aux.z, (z[mask].sum(), mask.sum())),
        (aux.entropy, (entropy[mask].sum(), mask.sum())),
    ):
        np.testing.assert_allclose(found.sum, total, rtol=1e-12)
        assert found.count == count


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("scope", ["group", "row", "global"])
def test_balance_is_one_when_balanced(name, scope):
    """With equal load and equal mean probability of all experts the loss is 1, for any K."""
    router = dataclasses.replace(ROUTERS[name][0], balance_scope=scope)
    given = inputs(padded=False, positions=E)
    preference = 3.0 * np.eye(E) + 2.0 * np.roll(np.eye(E), 1, 1) + np.roll(np.eye(E), 2, 1)
    preference += 0.5 * np.roll(np.eye(E), 3, 1)
    x_GSD = np.zeros((G, R * E, D))
    x_GSD[..., :E] = np.tile(preference, (R, 1))
    given = dataclasses.replace(given, x_GSD=jnp.asarray(x_GSD))
    _, aux = route(router, given, jnp.eye(D, E))
    np.testing.assert_allclose(aux.balance.value(), 1, rtol=1e-12)
    collapsed = jnp.asarray(np.broadcast_to(x_GSD[:, :1], x_GSD.shape))
    _, aux = route(router, dataclasses.replace(given, x_GSD=collapsed), jnp.eye(D, E))
    assert aux.balance.value() > 1.2


@pytest.mark.parametrize("name", ROUTERS)
def test_padding_changes_no_loss(name):
    router, given = ROUTERS[name][0], inputs()
    garbage = 50 * jnp.asarray(np.random.default_rng(9).normal(size=given.x_GSD.shape))
    x_GSD = jnp.where(given.mask_GS[..., None], given.x_GSD, garbage)
    _, aux = route(router, given, kernel())
    _, other = route(router, dataclasses.replace(given, x_GSD=x_GSD), kernel())
    jax.tree.map(np.testing.assert_array_equal, aux, other)


def test_z_loss_masks_the_loss_not_the_logits():
    """Zeroed logits would add log(E)^2 per padding token."""
    logits = jnp.ones((1, 4, E)).at[:, 2:].set(0.0)
    mask = jnp.array([[True, True, False, False]])
    aux = router_aux(logits, jax.nn.softmax(logits), Mean(jnp.zeros(()), jnp.ones(())), mask)
    np.testing.assert_allclose(aux.z.value(), (1 + np.log(E)) ** 2, rtol=1e-12)


def test_nothing_real_gives_zero_losses():
    given = dataclasses.replace(inputs(), mask_GS=jnp.zeros((G, S), bool))
    _, aux = route(Switch(), given, kernel())
    assert [float(mean.value()) for mean in aux[:3]] == [0, 0, 0] and aux.probs is None


@pytest.mark.parametrize("choices", [1, 3, E])
def test_top_choices_with_ties_and_nan(choices):
    """Ties go to the lower expert; a token with NaN gives NaN weights, and ids in range."""
    probs = jnp.asarray(np.random.default_rng(3).integers(0, 3, (2, 50, E)) / 4.0)
    weights, ids = top_choices(probs, choices)
    expected_weights, expected_ids = jax.lax.top_k(probs, choices)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(weights, expected_weights)
    weights, ids = top_choices(probs.at[0, 0].set(jnp.nan), choices)
    assert jnp.isnan(weights[0, 0, 0]) and not jnp.isnan(weights[1:]).any()
    assert ((ids >= 0) & (ids < E)).all()


# Gradients


def output_gradient(router, given, value_E):
    """d/dkernel of the combined output, if expert e outputs value_E[e] for every token."""

    def output(kernel_DE):
        choice, _ = route(router, given, kernel_DE)
        return (choice.weights_GSK * value_E[choice.ids_GSK]).sum()

    return np.asarray(jax.grad(output)(kernel()))


@pytest.mark.parametrize("name", ROUTERS)
def test_the_output_moves_the_router(name):
    """Gradients equal central differences; at K = 1 the weight is a probability, not 1."""
    router, given, value_E = ROUTERS[name][0], inputs(), jnp.arange(1.0, E + 1)
    gradient = output_gradient(router, given, value_E)
    step = np.zeros((D, E))
    step[2, 3] = 1e-6

    def output(kernel_DE):
        choice, _ = route(router, given, kernel_DE)
        return float((choice.weights_GSK * value_E[choice.ids_GSK]).sum())

    difference = (output(kernel() + step) - output(kernel() - step)) / 2e-6
    np.testing.assert_allclose(gradient[2, 3], difference, rtol=1e-5)
    assert np.abs(gradient).max() > 0.1


def test_the_trap_softmax_after_top_1_has_no_gradient():
    """The control: a renormalised top-1 has no gradient, so TopK refuses it."""
    trap = TopK(top_k=1, renormalize=False)
    object.__setattr__(trap, "renormalize", True)
    gradient = output_gradient(trap, inputs(), jnp.arange(1.0, E + 1))
    np.testing.assert_allclose(gradient, 0, atol=1e-12)
    with pytest.raises(UserError, match="no gradient"):
        TopK(top_k=1)


def test_balance_gradient_pulls_towards_balance():
    """One gradient step lowers the probability of the expert with the largest load."""
    given = inputs(padded=False)
    skewed = kernel().at[:, 0].add(given.x_GSD.reshape(-1, D).mean(0) * 8)
    router = TopK(top_k=2)

    def loss(kernel_DE):
        return route(router, given, kernel_DE)[1].balance.value()

    lower = skewed - 1e-2 * jax.grad(loss)(skewed)
    assert loss(lower) < loss(skewed)


@pytest.mark.parametrize("scope", ["group", "row"])
def test_balance_does_not_depend_on_the_split_into_microbatches(scope):
    """Sums and counts add over any split of the groups, and so do gradients."""
    given, router = inputs(), TopK(top_k=2, balance_scope=scope)

    def part(kernel_DE, groups):
        some = RouterIn(
            given.x_GSD[groups],
            given.token_ids_GS[groups],
            given.mask_GS[groups],
            given.keys_GR[groups],
            True,
        )
        return route(router, some, kernel_DE)[1].balance

    def loss(kernel_DE, splits):
        parts = [part(kernel_DE, groups) for groups in splits]
        return sum(p.sum for p in parts) / sum(p.count for p in parts)

    whole = jax.value_and_grad(loss)(kernel(), [slice(0, G)])
    for splits in ([slice(0, 1), slice(1, G)], [slice(i, i + 1) for i in range(G)]):
        split = jax.value_and_grad(loss)(kernel(), splits)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), split, whole)


def test_global_balance_sees_what_groups_do_not():
    """If each group routes all tokens to a different expert, only the global load is balanced."""
    ids = jnp.arange(G)[:, None, None] * jnp.ones((1, E, 1), jnp.int32)
    probs = jax.nn.one_hot(ids[..., 0], G, dtype=jnp.float64)
    mask = jnp.ones((G, E), bool)
    found = {
        scope: float(balance_loss(probs, ids, mask, scope=scope, rows=2).value())
        for scope in ("row", "group", "global")
    }
    assert found == {"row": G, "group": G, "global": 1}


# Randomness


@pytest.mark.parametrize("router", [GShard(), Switch(jitter=0.3), TopK(top_k=2, jitter=0.3)])
def test_noise_belongs_to_the_row(router):
    given = inputs()
    choice, _ = route(router, given, kernel())
    other, _ = route(router, same_rows_in_other_groups(given), kernel())
    for found, expected in zip(other, choice, strict=True):
        expected = np.asarray(expected).reshape(G * R, T, -1)[::-1]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("router", [GShard(), Switch(jitter=0.3), TopK(top_k=2, jitter=0.3)])
def test_noise_only_in_training_and_from_the_key(router):
    def noise(seed, train):
        given = dataclasses.replace(inputs(), keys_GR=inputs(seed).keys_GR, train=train)
        choice, _ = route(router, given, kernel())
        return np.concatenate([choice.weights_GSK, choice.valid_GSK], -1)

    np.testing.assert_array_equal(noise(0, False), noise(5, False))
    np.testing.assert_array_equal(noise(0, True), noise(0, True))
    assert (noise(0, True) != noise(5, True)).any()
    assert (noise(0, True) != noise(0, False)).any()


def test_jitter_multiplies_the_input_within_its_bounds():
    """With D = 1 the logit is x * kernel, so the logits show the noise itself."""
    given = dataclasses.replace(inputs(padded=False, positions=500), x_GSD=None)
    given = dataclasses.replace(given, x_GSD=jnp.ones((G, R * 500, 1)))
    router = Switch(jitter=0.1)
    _, noisy = route(router, given, jnp.array([[3.0]]))
    _, clean = route(router, dataclasses.replace(given, train=False), jnp.array([[3.0]]))
    # With one expert logsumexp is the logit: 3 u, u uniform in [0.9, 1.1].
    assert clean.z.value() == 9
    np.testing.assert_allclose(noisy.z.value(), 9 * (1 + 0.1**2 / 3), rtol=2e-3)


def test_the_second_expert_is_sampled_with_probability_min_1_2g():
    """Of many tokens with the same weight g2 < 1/2, a share of 2 g2 is sampled."""
    tokens = 2000
    given = inputs(padded=False, positions=tokens)
    n = G * R * tokens
    for second in (0.05, 0.2, 0.4, 0.5):
        logits = np.full(E, -40.0)
        logits[:2] = np.log([1 - second, second])
        x_GSD = jnp.ones((G, R * tokens, 1))
        choice, _ = route(
            GShard(), dataclasses.replace(given, x_GSD=x_GSD), jnp.asarray(logits[None])
        )
        assert choice.valid_GSK[..., 0].all()
        p = min(1.0, 2 * second)
        share = float(choice.valid_GSK[..., 1].mean())
        assert abs(share - p) <= 4 * np.sqrt(p * (1 - p) / n) + 1e-12


def test_a_logit_cap_bounds_large_logits_and_leaves_small_ones():
    """c * tanh(l / c) is below c, keeps the order, and is l - l^3 / (3 c^2) near zero."""
    given, cap = inputs(padded=False), 0.5
    plain = np.asarray(given.x_GSD) @ np.asarray(kernel())
    capped = np.asarray(TopK(logit_cap=cap).logits(given, kernel()))
    assert np.abs(plain).max() > 10 * cap
    assert np.abs(capped).max() <= cap
    np.testing.assert_allclose(capped, cap * np.tanh(plain / cap), rtol=1e-12)
    small = np.asarray(TopK(logit_cap=cap).logits(given, 1e-4 * kernel()))
    np.testing.assert_allclose(small, 1e-4 * plain, rtol=1e-5)
    np.testing.assert_array_equal(TopK().logits(given, kernel()), plain)
    with pytest.raises(UserError, match="logit_cap is -1"):
        TopK(logit_cap=-1)


def test_bfloat16_tokens_are_routed_in_float32():
    given = dataclasses.replace(inputs(), x_GSD=inputs().x_GSD.astype(jnp.bfloat16))
    choice, aux = route(TopK(top_k=2), given, kernel().astype(jnp.float32))
    assert choice.weights_GSK.dtype == aux.z.sum.dtype == jnp.float32
    logits = np.asarray(given.x_GSD, np.float64) @ np.asarray(kernel(), np.float32)
    expected = np.argsort(-logits, axis=-1, kind="stable")[..., :2]
    np.testing.assert_array_equal(choice.ids_GSK, expected)
