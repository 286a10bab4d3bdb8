"""Expert choice, hash and soft routing, whose load does not depend on learned weights."""

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
    same_rows_in_other_groups,
    softmax,
    worth,
)

from moe_jax.errors import UserError
from moe_jax.model.config import ModelConfig
from moe_jax.model.define import define
from moe_jax.moe.components import make_components, make_router, refuse_lookahead
from moe_jax.moe.config import MoEConfig
from moe_jax.moe.routers import ROUTERS
from moe_jax.moe.routers.expert_choice import ExpertChoiceRouter
from moe_jax.moe.routers.hash import Hash, expert_table
from moe_jax.moe.routers.soft import Soft
from moe_jax.moe.types import ParamSpec

pytestmark = pytest.mark.usefixtures("x64")

VALUE_E = jnp.arange(1.0, E + 1)


def route(router, given, kernel_DE=None):
    """The router's (choice, aux)."""
    return route_all(router, given, {"kernel": kernel() if kernel_DE is None else kernel_DE}, {})


def numpy_probs(given):
    logits = np.asarray(given.x_GSD) @ np.asarray(kernel())
    return logits, softmax(logits)


# Expert choice


@pytest.mark.parametrize(("top_k", "slots"), [(1, 2), (2, 4), (E, S)])
def test_experts_take_their_best_tokens(top_k, slots):
    """Experts take real tokens by weight, then padding; S is 12, E is 6."""
    given = inputs()
    mask = np.asarray(given.mask_GS)
    choice, aux = route(ExpertChoiceRouter(top_k=top_k), given)
    logits, probs = numpy_probs(given)
    assert choice.ids_GEC.shape == (G, E, slots)
    for g, e in np.ndindex(G, E):
        order = sorted(range(S), key=lambda s: (not mask[g, s], -probs[g, s, e] * mask[g, s], s))
        assert choice.ids_GEC[g, e].tolist() == order[:slots]
        expected = probs[g, order[:slots], e]
        np.testing.assert_allclose(choice.weights_GEC[g, e], expected, rtol=1e-12)
    assert_aux(aux, mask, (mask.sum(), mask.sum()), logits, probs)


@pytest.mark.parametrize(("experts", "top_k", "slots"), [(5, 2, 5), (5, 1, 3), (8, 1, 2)])
def test_slots_are_rounded_up(experts, top_k, slots):
    """C is ceil(12 * 2 / 5), ceil(12 / 5), ceil(12 / 8)."""
    kernel_DE = jnp.ones((D, experts))
    choice, _ = route(ExpertChoiceRouter(top_k=top_k), inputs(padded=False), kernel_DE)
    assert choice.ids_GEC.shape[2] == slots


def test_expert_choice_by_hand():
    """Expert 0 prefers tokens 2 and 0; expert 1 prefers tokens 3, 1 and, little less, 0."""
    share = np.array([[0.6, 0.4], [0.5, 0.5], [0.9, 0.1], [0.2, 0.8]])
    choice, _ = route(ExpertChoiceRouter(top_k=1), logits_inputs(np.log(share)), jnp.eye(2))
    assert choice.ids_GEC[0].tolist() == [[2, 0], [3, 1]]
    np.testing.assert_allclose(choice.weights_GEC[0], [[0.9, 0.6], [0.8, 0.5]], rtol=1e-12)


def test_ties_go_to_the_lower_token():
    choice, _ = route(ExpertChoiceRouter(), inputs(padded=False), jnp.zeros((D, E)))
    np.testing.assert_array_equal(choice.ids_GEC, np.broadcast_to(np.arange(4), (G, E, 4)))


def test_every_expert_fills_its_slots_with_different_real_tokens():
    """For a router of any skew, also after the conversion to a TokenChoice."""
    given = inputs()
    mask = np.asarray(given.mask_GS)
    skewed = kernel().at[:, 0].add(9 * given.x_GSD.reshape(-1, D).mean(0))
    choice, _ = route(ExpertChoiceRouter(), given, skewed)
    by_token = choice.by_token(S)
    taken = np.asarray(by_token.valid_GSK) & mask[..., None]
    for g in range(G):
        assert all(len(set(ids)) == 4 for ids in choice.ids_GEC[g].tolist())
        np.testing.assert_array_equal(taken[g].sum(0), min(4, mask[g].sum()))
    assert mask.sum(1).max() >= 4


def test_padding_decides_nothing():
    given = inputs()
    garbage = 50 * jnp.asarray(np.random.default_rng(9).normal(size=given.x_GSD.shape))
    x_GSD = jnp.where(given.mask_GS[..., None], given.x_GSD, garbage)
    choice, aux = route(ExpertChoiceRouter(), given)
    other, other_aux = route(ExpertChoiceRouter(), dataclasses.replace(given, x_GSD=x_GSD))
    jax.tree.map(np.testing.assert_array_equal, aux, other_aux)
    np.testing.assert_array_equal(choice.ids_GEC, other.ids_GEC)


@pytest.mark.parametrize("router", [ExpertChoiceRouter(), Soft(num_experts=E)])
def test_the_output_moves_the_router(router):
    """The output's gradient equals central differences; the balance loss has none."""
    given = inputs()

    def output(kernel_DE):
        choice, _ = route(router, given, kernel_DE)
        return worth(choice.by_token(S) if hasattr(choice, "ids_GEC") else choice, VALUE_E)

    gradient = jax.grad(output)(kernel())
    difference = central_difference(output, kernel(), (2, 3))
    np.testing.assert_allclose(gradient[2, 3], difference, rtol=1e-5)
    assert jnp.abs(gradient).max() > 0.1
    balance = jax.grad(lambda kernel_DE: route(router, given, kernel_DE)[1].balance.value())
    np.testing.assert_array_equal(balance(kernel()), 0)


# Soft


def test_soft_weighs_every_expert():
    given = inputs()
    mask = np.asarray(given.mask_GS)
    choice, aux = route(Soft(num_experts=E), given)
    logits, probs = numpy_probs(given)
    assert Soft(num_experts=E).choices_per_token == E
    np.testing.assert_array_equal(choice.ids_GSK, np.broadcast_to(np.arange(E), probs.shape))
    np.testing.assert_allclose(choice.weights_GSK, probs, rtol=1e-12)
    assert choice.valid_GSK.all()
    assert_aux(aux, mask, (mask.sum(), mask.sum()), logits, probs)


# Hash


@pytest.mark.parametrize(("size", "experts", "choices"), [(96, 6, 2), (100, 8, 3), (64, 4, 4)])
def test_the_table_is_balanced_and_its_choices_differ(size, experts, choices):
    table = expert_table(size, experts, choices, 0)
    assert table.shape == (size, choices)
    assert all(len(set(row)) == choices for row in table.tolist())
    for k in range(choices):
        count = np.bincount(table[:, k], minlength=experts)
        assert count.min() >= size // experts
        assert count.max() <= -(-size // experts)
    # The second expert of an id does not follow from the first.
    assert len({tuple(row) for row in table[:, :2].tolist()}) > experts
    assert (table != expert_table(size, experts, choices, 1)).any()


def test_the_table_never_changes():
    """The table is the same in every version of NumPy; a change would reassign trained experts."""
    first, second = expert_table(12, 4, 2, 0).T.tolist()
    assert first == [3, 0, 3, 2, 0, 0, 1, 1, 2, 2, 3, 1]
    assert second == [0, 2, 1, 0, 1, 1, 3, 2, 3, 3, 0, 2]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_hash_looks_token_ids_up(scope, top_k):
    router = Hash(num_experts=E, top_k=top_k, balance_scope=scope, table_size=24)
    given = inputs()
    ids, mask = np.asarray(given.token_ids_GS), np.asarray(given.mask_GS)
    assert ids.max() > 24  # some ids wrap around
    choice, aux = route_all(router, given, {}, {})
    expected = expert_table(24, E, top_k, 0)[ids % 24]
    assert router.choices_per_token == top_k
    np.testing.assert_array_equal(choice.ids_GSK, expected)
    np.testing.assert_array_equal(choice.weights_GSK, np.full(expected.shape, 1 / top_k))
    assert choice.valid_GSK.all()
    probs = np.eye(E)[expected].mean(-2)
    assert_aux(aux, mask, numpy_balance(probs, expected, mask, scope))


def test_hash_balance_by_hand():
    """One id per expert: shares 1/2, 1/2, 0, 0 give 4 * (1/4 + 1/4) = 2; equal shares give 1."""
    router = Hash(num_experts=4, top_k=1, table_size=4)
    given = logits_inputs(np.zeros((4, 4)))
    for ids, value in (([0, 1, 0, 1], 2), ([0, 1, 2, 3], 1), ([3] * 4, 4)):
        some = dataclasses.replace(given, token_ids_GS=jnp.array([ids], jnp.int32))
        assert float(route_all(router, some, {}, {})[1].balance.value()) == value


def test_hash_ignores_activations():
    given = inputs()
    nan = dataclasses.replace(given, x_GSD=jnp.full_like(given.x_GSD, jnp.nan))
    router = Hash(num_experts=E)
    jax.tree.map(
        np.testing.assert_array_equal,
        route_all(router, given, {}, {}),
        route_all(router, nan, {}, {}),
    )
    choice, _ = route_all(router, given, {}, {})
    other, _ = route_all(router, same_rows_in_other_groups(given), {}, {})
    np.testing.assert_array_equal(
        other.ids_GSK.reshape(G * R, -1), choice.ids_GSK.reshape(G * R, -1)[::-1]
    )


@pytest.mark.parametrize(
    ("options", "message"), [({"table_size": 5}, "table_size"), ({"seed": -1}, "seed")]
)
def test_hash_knobs_that_cannot_work_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Hash(num_experts=E, **options)


# The table of routers


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_is_built_from_the_shared_knobs(name):
    """The router gets num_experts and top_k of the model; its kernels are [D, E]."""
    router = make_router(MoEConfig(router=name, num_experts=12, top_k=3))
    expected = {"switch": 1, "gshard": 2, "soft": 12}.get(name, 3)
    assert router.choices_per_token == expected
    assert router.causal == (name != "expert_choice")
    for spec in router.param_specs(D, 12).values():
        assert spec == ParamSpec((D, 12), ("embed", "router_experts"), spec.std)
    shapes = {key: spec.shape for key, spec in router.state_specs(12).items()}
    assert shapes == ({"bias": (12,)} if name == "sigmoid_bias" else {})


def test_a_next_token_model_refuses_to_look_ahead():
    config = MoEConfig(router="expert_choice")
    with pytest.raises(UserError, match=r"expert_choice: later tokens.*see the future.*top_k"):
        refuse_lookahead(make_components(config), config)
    model = ModelConfig(vocab_size=16, width=8, num_layers=1, moe=config)
    with pytest.raises(UserError, match="see the future"):
        define(model, jnp.float32)
    define(dataclasses.replace(model, dense=True), jnp.float32)
    for name in sorted(set(ROUTERS) - {"expert_choice"}):
        config = MoEConfig(router=name)
        refuse_lookahead(make_components(config), config)
