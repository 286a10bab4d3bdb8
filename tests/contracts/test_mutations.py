"""Injects bugs that trainers have shipped, one by one; the right check must catch each.

A mutant changes the real layer in memory; the oracle shares no code with it.  MATRIX mutants run in
one cell of the conformance matrix and must show in the quantity named; the others have a small
check of their own.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.moe import layer as moe_layer
from moe_jax.moe.dispatch import bounded as slots
from moe_jax.moe.dispatch import capacity, einsum, packed, region
from moe_jax.moe.experts import Experts
from moe_jax.moe.routers import ROUTERS, linear, noisy_top_k, sigmoid_bias
from moe_jax.moe.routers.sigmoid_bias import SigmoidBias
from moe_jax.moe.types import ExpertChoice, Mean
from moe_jax.parallel import collectives
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.tools.doctor.conformance import cases
from moe_jax.tools.doctor.conformance.compare import TOLERANCES, errors
from moe_jax.tools.doctor.conformance.oracle import expected
from moe_jax.tools.doctor.conformance.subject import compiled

ALONE = MeshConfig(data=1)
EXPERTS_APART = MeshConfig(data=1, expert=2)
EXPERTS_CUT = MeshConfig(data=1, tensor=2)


class Mutant(NamedTuple):
    """A bug, the quantity that it makes wrong, and the layer and scenario that show it."""

    name: str
    inject: Callable[[Any], None]  # takes a function patch(object, attribute, value)
    quantity: str
    router: str = "top_k"
    dispatch: str = "capacity"
    scenario: str = "skewed"
    mesh: MeshConfig = ALONE
    train: bool = True


def wrapped(owner: Any, name: str, change: Callable) -> Callable[[Any], None]:
    """Make a function that replaces owner.name by change(owner.name) while the test runs."""
    return lambda patch: patch(owner, name, change(getattr(owner, name)))


def replaced(owner: Any, name: str, value: Any) -> Callable[[Any], None]:
    """Make a function that replaces owner.name while the test runs."""
    return lambda patch: patch(owner, name, value)


def knob(**knobs) -> Callable[[Any], None]:
    """Make a function that builds the router with these knobs, whatever the config says."""

    def inject(make):
        def mutated(*given):
            parts = make(*given)
            router = dataclasses.replace(parts.router, **knobs)
            return dataclasses.replace(parts, router=router)

        return mutated

    return wrapped(moe_layer, "make_components", inject)


def weights(change: Callable) -> Callable[[Any], None]:
    """Make a function that changes the combine weights."""

    def of_path(gather_weights):
        return lambda weights_NK, moves: gather_weights(change(weights_NK), moves)

    return wrapped(capacity, "gather_weights", of_path)


def losses(change: Callable) -> Callable[[Any], None]:
    """Make a function that changes the inputs (probs, ids, mask) of balance_loss."""

    def of_loss(balance_loss):
        return lambda *arrays, **knobs: balance_loss(*change(*arrays), **knobs)

    return wrapped(linear, "balance_loss", of_loss)


def logits(change: Callable) -> Callable[[Any], None]:
    """Make a function that replaces linear_logits by change(linear_logits, *arguments)."""

    def of_logits(linear_logits):
        return lambda *given: change(linear_logits, *given)

    return wrapped(linear, "linear_logits", of_logits)


def region_psum(psum: Callable) -> Callable[[Any], None]:
    """Make a function that replaces the sum over tensor shards after the dispatch region."""
    lax = SimpleNamespace(psum=psum)
    shim = SimpleNamespace(lax=lax, shard_map=jax.shard_map, Array=jax.Array)
    return replaced(region, "jax", shim)


def z_of_padding(router_aux):
    """Zeroes the logits of padding, but counts their logsumexp."""

    def aux(logits_GSE, probs_GSE, balance, mask_GS):
        right = router_aux(logits_GSE, probs_GSE, balance, mask_GS)
        every = router_aux(logits_GSE * mask_GS[..., None], probs_GSE, balance, mask_GS | True)
        return right._replace(z=Mean(every.z.sum, right.z.count))

    return aux


def biased_weights(top_choices):
    """Weights by the scores that selected the experts, including the bias."""

    def choose(log_scores_GSE, choices, ranked_by_GSE=None):
        if ranked_by_GSE is None:
            return top_choices(log_scores_GSE, choices)
        _, ids = top_choices(log_scores_GSE, choices, ranked_by_GSE)
        bias = jnp.log(ranked_by_GSE) - jax.lax.stop_gradient(log_scores_GSE)
        biased = log_scores_GSE + jnp.where(jnp.isfinite(bias), bias, 0)
        return jnp.take_along_axis(biased, ids, -1), ids

    return choose


def noise_by_place(row_uniform):
    """Draws noise from a row's index on this device or in this microbatch, not from its key."""

    def noise(keys_GR, purpose, shape, dtype):
        keys = jax.random.split(jax.random.wrap_key_data(jnp.zeros(2, jnp.uint32)), keys_GR.shape)
        return row_uniform(keys, purpose, shape, dtype)

    return noise


def without_gradient_of_expert_3(batched):
    def apply(self, x_END, *weights):
        cut = self.w_out_EFD.at[3].set(jax.lax.stop_gradient(self.w_out_EFD[3]))
        return batched(dataclasses.replace(self, w_out_EFD=cut), x_END, *weights)

    return apply


def counts_all_as_kept(account):
    def counted(choice, by_token, kept_GSK, *rest):
        return account(choice, by_token, kept_GSK | True, *rest)

    return counted


def takes_padding(route):
    def chosen(self, inputs, params, state):
        return route(
            self, dataclasses.replace(inputs, mask_GS=inputs.mask_GS | True), params, state
        )

    return chosen


MATRIX = [
    Mutant(
        "drops the unsort",
        replaced(packed, "invert_permutation", lambda a: a),
        "output",
        "top_k",
        "dropless",
    ),
    Mutant(
        "swaps the priorities",
        replaced(slots, "SLOWEST_FIRST", {"token": (0, 3, 2, 1), "choice": (0, 2, 1, 3)}),
        "kept by position",
    ),
    Mutant(
        "divides the balance loss by K",
        wrapped(linear, "balance_loss", lambda f: lambda *a, **k: Mean(f(*a, **k).sum / 3, 1.0)),
        "balance",
    ),
    Mutant(
        "takes the softmax after top-k at K=1",
        weights(jnp.ones_like),
        "gradient of router_kernel",
        "switch",
    ),
    Mutant(
        "routes padding",
        wrapped(
            capacity, "routed_ids", lambda f: lambda choice, mask, E: f(choice, mask | True, E)
        ),
        "kept by total",
        scenario="padded",
    ),
    Mutant(
        "cuts the gradient of the gate", weights(jax.lax.stop_gradient), "gradient of router_kernel"
    ),
    Mutant(
        "has one slot too many",
        wrapped(slots, "expert_capacity", lambda f: lambda *a: f(*a) + 1),
        "dropped_capacity by total",
    ),
    Mutant(
        "has one slot too few",
        wrapped(slots, "expert_capacity", lambda f: lambda *a: f(*a) - 1),
        "dropped_capacity by total",
        dispatch="einsum",
    ),
    Mutant(
        "swaps axes around the all-to-all",
        wrapped(
            collectives,
            "_exchange",
            lambda f: lambda x, axis: f(x.swapaxes(1, 2), axis).swapaxes(1, 2)[:, ::-1],
        ),
        "output",
        mesh=EXPERTS_APART,
    ),
    Mutant(
        "balances padding too",
        losses(lambda probs, ids, mask: (probs, ids, mask | True)),
        "balance",
        scenario="padded",
    ),
    Mutant(
        "takes the z-loss of padding",
        wrapped(linear, "router_aux", z_of_padding),
        "z",
        scenario="padded",
    ),
    Mutant("forgets to renormalise", knob(renormalize=False), "output"),
    Mutant("ignores the logit cap", knob(logit_cap=0.0), "gradient of router_kernel"),
    Mutant("balances rows, not groups", knob(balance_scope="row"), "balance"),
    Mutant(
        "always takes the second expert", knob(random_second=False), "unsampled by total", "gshard"
    ),
    Mutant(
        "weighs with the selection bias",
        wrapped(sigmoid_bias, "top_choices", biased_weights),
        "output",
        "sigmoid_bias",
    ),
    Mutant(
        "selects without the bias",
        wrapped(SigmoidBias, "route", lambda f: lambda s, i, p, state: f(s, i, p, {"bias": 0.0})),
        "kept by expert",
        "sigmoid_bias",
    ),
    Mutant("ignores expert groups", knob(top_groups=4), "kept by expert", "sigmoid_bias"),
    Mutant("forgets the scale of routed experts", knob(routed_scale=1.0), "output", "sigmoid_bias"),
    Mutant(
        "measures a chosen expert against itself",
        wrapped(
            noisy_top_k,
            "chosen_probability",
            lambda f: lambda logits, std, chosen, top: f(logits, std, chosen & False, top),
        ),
        "balance",
        "noisy_top_k",
    ),
    Mutant(
        "draws noise by place, not by row",
        wrapped(linear, "row_uniform", noise_by_place),
        "gradient of tokens",
        "switch",
    ),
    Mutant(
        "jitters in evaluation",
        logits(lambda f, inputs, *rest: f(dataclasses.replace(inputs, train=True), *rest)),
        "gradient of tokens",
        "switch",
        train=False,
    ),
    Mutant(
        "multiplies the router in bfloat16",
        logits(lambda f, i, kernel, jitter: f(i, kernel.astype(jnp.bfloat16), jitter)),
        "gradient of tokens",
    ),
    Mutant(
        "gives one expert no gradient",
        wrapped(Experts, "batched", without_gradient_of_expert_3),
        "gradient of w_out_EFD, expert 3",
    ),
    Mutant(
        "counts a dropped token as kept",
        wrapped(moe_layer, "account", counts_all_as_kept),
        "dropped_capacity by total",
    ),
    Mutant(
        "averages over tensor shards",
        region_psum(jax.lax.pmean),
        "output",
        mesh=EXPERTS_CUT,
    ),
    Mutant(
        "adds tensor shards twice",
        region_psum(lambda y, axis: 2 * jax.lax.psum(y, axis)),
        "output",
        mesh=EXPERTS_CUT,
    ),
    Mutant(
        "gives padding to experts that choose",
        wrapped(ROUTERS["expert_choice"], "route", takes_padding),
        "padding by total",
        "expert_choice",
        scenario="padded",
    ),
    Mutant(
        "loses the weights of experts that choose",
        wrapped(
            ExpertChoice,
            "by_token",
            lambda f: (
                lambda choice, tokens: f(choice, tokens)._replace(
                    weights_GSK=jnp.ones_like(f(choice, tokens).weights_GSK)
                )
            ),
        ),
        "output",
        "expert_choice",
    ),
    Mutant(
        "asks the next expert for a slot",
        wrapped(einsum, "routed_ids", lambda f: lambda c, m, E: (f(c, m, E) + 1) % (E + 1)),
        "kept by expert",
        dispatch="einsum",
    ),
]


def layer_of(mutant: Mutant) -> cases.Layer:
    plain = cases.layer(mutant.router, mutant.dispatch, "one_device", "float32", remat=False)
    return dataclasses.replace(plain, mesh=mutant.mesh, train=mutant.train)


def wrong(mutant: Mutant) -> set[str]:
    """The quantities of the mutant's layer beyond the tolerance."""
    layer = layer_of(mutant)
    case = cases.scenarios(layer.model)[mutant.scenario]
    found = errors(compiled(layer)(case), expected(layer, case))
    return {error.quantity for error in found if error.relative > TOLERANCES["cpu", "float32"]}


@functools.cache
def wrong_unbroken(*layer_and_scenario) -> set[str]:
    return wrong(Mutant("none", lambda patch: None, "", *layer_and_scenario))


def _params():
    """The test parameters: by default the first mutant of each quantity; all with --full."""
    seen: set[str] = set()
    for mutant in MATRIX:
        marks = [pytest.mark.full] if mutant.quantity in seen else []
        seen.add(mutant.quantity)
        yield pytest.param(mutant, id=mutant.name.replace(" ", "-"), marks=marks)


@pytest.mark.lifecycle
@pytest.mark.parametrize("mutant", list(_params()))
def test_the_matrix_catches(mutant, monkeypatch):
    assert not wrong_unbroken(*mutant[3:])
    mutant.inject(monkeypatch.setattr)
    assert mutant.quantity in wrong(mutant)


def stds_of_experts() -> np.ndarray:
    """The std of each expert's initial w_in, in multiples of 1 / sqrt(fan-in)."""
    plain = cases.layer("top_k", "dense", "one_device", "float32", remat=False).model
    moe = dataclasses.replace(plain.moe, num_experts=64)
    layer = moe_layer.MoE(moe, plain.width, dtype=jnp.float32, rngs=nnx.Rngs(params=0))
    return np.asarray(layer.w_in_EDUF[...]).std((1, 2, 3)) * np.sqrt(plain.width)


def test_init_catches_experts_scaled_by_the_stack(monkeypatch):
    assert np.abs(stds_of_experts() - 1).max() < 0.2
    true = moe_layer.fan_in
    monkeypatch.setattr(moe_layer, "fan_in", lambda size, scale: true(size * 64, scale))
    assert np.abs(stds_of_experts() - 1).max() > 0.5


def bias_after_a_step() -> np.ndarray:
    """The bias of experts with loads below, at and above the mean, in units of `update_rate`."""
    router = SigmoidBias(num_experts=3, top_k=2, update_rate=0.25)
    state = router.next_state({"bias": jnp.zeros((1, 3))}, jnp.array([[0, 2, 4]]))
    return np.asarray(state["bias"][0]) / 0.25


def test_the_bias_rule_catches_a_flipped_sign(monkeypatch):
    np.testing.assert_array_equal(bias_after_a_step(), [1, 0, -1])
    true = SigmoidBias.next_state
    monkeypatch.setattr(SigmoidBias, "next_state", lambda s, b, load: true(s, b, -load))
    np.testing.assert_array_equal(bias_after_a_step(), [-1, 0, 1])
