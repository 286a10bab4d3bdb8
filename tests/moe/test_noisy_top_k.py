"""Noisy top-k against NumPy in float64, against values by hand, and at singular points."""

import dataclasses
import math

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
    T,
    assert_aux,
    central_difference,
    inputs,
    kernel,
    logits_inputs,
    route_all,
    same_rows_in_other_groups,
    scope_parts,
    softmax,
    worth,
)

from moe_jax.errors import UserError
from moe_jax.moe.noise import NOISY_LOGITS, row_normal
from moe_jax.moe.routers.noisy_top_k import NoisyTopK, chosen_probability
from moe_jax.moe.types import RouterIn

pytestmark = pytest.mark.usefixtures("x64")

VALUE_E = jnp.arange(1.0, E + 1)


def params():
    return {"kernel": kernel(1), "noise_kernel": kernel(2)}


def numpy_noise(given):
    """Draw N(0, 1) noise of each row from its key alone, in float32."""
    keys = given.keys_GR.reshape(-1)
    rows = [jax.random.normal(jax.random.fold_in(key, 2), (T, E), jnp.float32) for key in keys]
    return np.stack(rows).reshape(*given.mask_GS.shape, E).astype(np.float64)


def numpy_route(given, choices):
    """Compute (clean logits, ids, weights, gates [G, S, E], load [G, S, E]) token by token."""
    x, both = np.asarray(given.x_GSD), params()
    clean, std = x @ np.asarray(both["kernel"]), np.ones(1)
    noisy = clean
    if given.train:
        std = np.log1p(np.exp(x @ np.asarray(both["noise_kernel"])))
        noisy = clean + numpy_noise(given) * std
    ids = np.argsort(-noisy, axis=-1, kind="stable")[..., :choices]
    weights = softmax(np.take_along_axis(noisy, ids, -1))
    gates, load = np.zeros(clean.shape), np.zeros(clean.shape)
    np.put_along_axis(gates, ids, weights, -1)
    for g, s, e in np.ndindex(clean.shape):
        others = np.sort(np.delete(noisy[g, s], e))[::-1]
        if not given.train:
            load[g, s, e] = e in ids[g, s]
        elif choices == E:
            load[g, s, e] = 1
        else:
            above = (clean[g, s, e] - others[choices - 1]) / std[g, s, e]
            load[g, s, e] = (1 + math.erf(above / math.sqrt(2))) / 2
    return clean, ids, weights, gates, load


def numpy_variation(gates, load, mask, scope):
    """The (sum, count) of 1 + CV^2 + CV^2 over the parts of `scope`."""
    parts, total = scope_parts(scope), 0.0
    gates, load, mask = gates.reshape(*parts, E), load.reshape(*parts, E), mask.reshape(parts)
    for part in range(parts[0]):
        m = mask[part]
        if m.any():
            sums = gates[part][m].sum(0), load[part][m].sum(0)
            total += m.sum() * (1 + sum(v.var() / v.mean() ** 2 for v in sums))
    return total, mask.sum()


@pytest.mark.parametrize(
    ("scope", "train", "choices"),
    [
        ("group", True, 2),
        ("row", True, 2),
        ("global", True, 3),
        ("row", False, 2),
        ("row", True, E),
    ],
)
def test_choices_weights_and_losses(scope, train, choices):
    router = NoisyTopK(top_k=choices, balance_scope=scope)
    given = inputs(train=train)
    mask = np.asarray(given.mask_GS)
    choice, aux = route_all(router, given, params(), {})
    clean, ids, weights, gates, load = numpy_route(given, choices)
    assert router.choices_per_token == choices
    np.testing.assert_array_equal(choice.ids_GSK, ids)
    np.testing.assert_allclose(choice.weights_GSK, weights, rtol=1e-12)
    assert choice.valid_GSK.all()
    assert_aux(aux, mask, numpy_variation(gates, load, mask, scope), clean, softmax(clean))


def test_importance_and_load_by_hand():
    """Weights 3/4, 1/4, 0 and 1/4, 0, 3/4: importance (1, 1/4, 3/4), load (2, 1, 1).

    CV^2 = (42/432) / (2/3)^2 = 7/32 and (2/9) / (4/3)^2 = 1/8.
    """
    given = logits_inputs([[np.log(3), 0, -60], [0, -60, np.log(3)]])
    choice, aux = route_all(NoisyTopK(), given, {"kernel": jnp.eye(3)}, {})
    np.testing.assert_array_equal(choice.ids_GSK[0], [[0, 1], [2, 0]])
    np.testing.assert_allclose(choice.weights_GSK[0], [[0.75, 0.25], [0.75, 0.25]], rtol=1e-12)
    np.testing.assert_allclose(aux.balance.value(), 1 + 7 / 32 + 1 / 8, rtol=1e-12)


def test_the_probability_to_be_chosen_by_hand():
    """K = 2: the second largest of the others is -1 for experts 0 and 1 (chosen), 0.2 for 2."""
    probability = chosen_probability(
        jnp.array([[[1.0, 0.0, -1.0]]]),
        jnp.ones((1, 1, 3)),
        jnp.array([[[True, True, False]]]),
        jnp.array([[[1.5, 0.2, -1.0]]]),
    )
    expected = [0.9772498680518208, 0.8413447460685429, 0.11506967022170828]
    np.testing.assert_allclose(probability[0, 0], expected, rtol=1e-12)


@pytest.mark.parametrize("scope", SCOPES)
def test_balance_is_one_when_balanced(scope):
    """Token n prefers expert n, then n + 1, so each row chooses all experts equally often."""
    logits = 3.0 * np.eye(E) + 2.0 * np.roll(np.eye(E), 1, 1)
    given = inputs(padded=False, train=False)
    x_GSD = jnp.zeros((G, R * T, D)).at[..., :E].set(np.tile(logits, (R, 1)))
    given = dataclasses.replace(given, x_GSD=x_GSD)
    router = NoisyTopK(balance_scope=scope)
    _, aux = route_all(router, given, {"kernel": jnp.eye(D, E)}, {})
    np.testing.assert_allclose(aux.balance.value(), 1, rtol=1e-12)
    collapsed = dataclasses.replace(given, x_GSD=jnp.broadcast_to(x_GSD[:, :1], x_GSD.shape))
    _, aux = route_all(router, collapsed, {"kernel": jnp.eye(D, E)}, {})
    assert aux.balance.value() > 3


def test_zero_kernels_spread_tokens_evenly():
    """Initially noise alone chooses: each expert gets K / E of the tokens, within 4 sigma."""
    positions = 1000
    given = inputs(padded=False, positions=positions)
    specs = NoisyTopK().param_specs(D, E)
    assert {name: (spec.shape, spec.std) for name, spec in specs.items()} == {
        "kernel": ((D, E), 0),
        "noise_kernel": ((D, E), 0),
    }
    zero = {name: jnp.zeros(spec.shape) for name, spec in specs.items()}
    choice, _ = route_all(NoisyTopK(), given, zero, {})
    share = np.bincount(np.ravel(choice.ids_GSK), minlength=E) / (G * R * positions)
    assert np.abs(share - 2 / E).max() < 4 * np.sqrt(2 / E * (1 - 2 / E) / (G * R * positions))


# Gradients


def total(router, given, both):
    """Sum output and balance loss, which depend on both kernels."""
    choice, aux = route_all(router, given, both, {})
    return worth(choice, VALUE_E) + aux.balance.value()


@pytest.mark.parametrize("choices", [2, E])
@pytest.mark.parametrize("name", ["kernel", "noise_kernel"])
def test_the_output_and_the_losses_move_both_kernels(name, choices):
    """Gradients equal central differences, also with K = E, where the load has no threshold."""
    router, given, both = NoisyTopK(top_k=choices), inputs(), params()
    gradient = jax.grad(lambda both: total(router, given, both))(both)[name]
    difference = central_difference(
        lambda kernel_DE: total(router, given, both | {name: kernel_DE}), both[name], (2, 3)
    )
    np.testing.assert_allclose(gradient[2, 3], difference, rtol=1e-5)
    assert jnp.abs(gradient).max() > 0.01


@pytest.mark.parametrize("name", ["kernel", "noise_kernel"])
def test_load_alone_has_a_gradient(name):
    """The smooth load has a gradient, also at the initial zeros; the count of tokens has none."""
    given = inputs()

    def balance(both):
        return route_all(NoisyTopK(), given, both, {})[1].balance.value()

    zero = jax.tree.map(jnp.zeros_like, params())
    for both in (params(), zero):
        gradient = jax.grad(balance)(both)[name]
        assert jnp.isfinite(gradient).all() and jnp.abs(gradient).max() > 1e-3


def test_vanishing_noise_leaves_no_nan():
    """In float32 softplus(-150) is 0; softplus(-60) is not, but its square is."""
    given = inputs()
    x_GSD = given.x_GSD.astype(jnp.float32).at[..., 0].set(1)
    given = dataclasses.replace(given, x_GSD=x_GSD)
    for shift in (-40.0, -60.0, -150.0):
        both = jax.tree.map(lambda a: a.astype(jnp.float32), params())
        both["noise_kernel"] = both["noise_kernel"].at[0].add(shift)
        value, gradients = jax.value_and_grad(lambda both: total(NoisyTopK(), given, both))(both)
        assert value.dtype == jnp.float32
        assert jnp.isfinite(value)
        assert all(jnp.isfinite(gradient).all() for gradient in gradients.values())


# Randomness, padding, refusals


def test_noise_belongs_to_the_row():
    given = inputs()
    choice, aux = route_all(NoisyTopK(balance_scope="row"), given, params(), {})
    other, other_aux = route_all(
        NoisyTopK(balance_scope="row"), same_rows_in_other_groups(given), params(), {}
    )
    for found, expected in zip(other, choice, strict=True):
        expected = np.asarray(expected).reshape(G * R, T, -1)[::-1]
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(other_aux.balance.sum, aux.balance.sum, rtol=1e-12)


def test_noise_only_in_training_and_from_the_key():
    def weights(seed, train):
        given = dataclasses.replace(inputs(), keys_GR=inputs(seed).keys_GR, train=train)
        return np.asarray(route_all(NoisyTopK(), given, params(), {})[0].weights_GSK)

    np.testing.assert_array_equal(weights(0, False), weights(5, False))
    assert (weights(0, True) != weights(5, True)).any()
    assert (weights(0, True) != weights(0, False)).any()


def test_noise_is_the_same_at_every_precision():
    keys_GR = inputs().keys_GR
    wide = row_normal(keys_GR, NOISY_LOGITS, (T, E), jnp.float64)
    narrow = row_normal(keys_GR, NOISY_LOGITS, (T, E), jnp.float32)
    np.testing.assert_array_equal(wide, narrow.astype(jnp.float64))


def test_padding_changes_no_loss():
    given = inputs()
    garbage = 50 * jnp.asarray(np.random.default_rng(9).normal(size=given.x_GSD.shape))
    x_GSD = jnp.where(given.mask_GS[..., None], given.x_GSD, garbage)
    _, aux = route_all(NoisyTopK(), given, params(), {})
    _, other = route_all(NoisyTopK(), dataclasses.replace(given, x_GSD=x_GSD), params(), {})
    jax.tree.map(np.testing.assert_array_equal, aux, other)


@pytest.mark.parametrize("scope", ["group", "row"])
def test_the_balance_adds_over_microbatches(scope):
    given, router = inputs(), NoisyTopK(balance_scope=scope)

    def balance(groups):
        arrays = (given.x_GSD, given.token_ids_GS, given.mask_GS, given.keys_GR)
        part = RouterIn(*(a[groups] for a in arrays), given.train)
        return route_all(router, part, params(), {})[1].balance

    whole, first, rest = balance(slice(0, G)), balance(slice(0, 1)), balance(slice(1, G))
    np.testing.assert_allclose(first.sum + rest.sum, whole.sum, rtol=1e-12)
    assert first.count + rest.count == whole.count


def test_one_expert_a_token_is_refused():
    with pytest.raises(UserError, match="no gradient"):
        NoisyTopK(top_k=1)
