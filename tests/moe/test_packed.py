"""Capacity without slots, as GPUs run it: equal kept assignments, outputs and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.moe import experts
from moe_jax.moe.config import PRIORITIES, MoEConfig
from moe_jax.moe.dispatch import moves
from moe_jax.moe.dispatch.bounded import PriorityOrder
from moe_jax.moe.dispatch.capacity import slot_moves
from moe_jax.moe.dispatch.dropless import shard_moves
from moe_jax.moe.dispatch.packed import sorted_indices
from moe_jax.moe.experts import Experts
from moe_jax.moe.layer import MoE
from moe_jax.moe.types import MoEContext
from moe_jax.ops import expert_activation
from moe_jax.ops.grouped_matmul import grouped_matmul

B, ROWS, T, D = 4, 2, 12, 8

pytestmark = pytest.mark.usefixtures("x64")


def forward_backward(
    mesh,
    priority: str,
    router: str,
    factor: float = 1.0,
    dispatch: str = "capacity",
    top_k: int = 2,
):
    """Run a layer with drops and padding: ((y, aux), gradients) for one cotangent."""
    moe = MoEConfig(
        num_experts=4,
        top_k=top_k,
        expert_width=6,
        router=router,
        dispatch=dispatch,
        priority=priority,
        capacity_factor=factor,
    )
    module = MoE(moe, D, dtype=jnp.float64, rngs=nnx.Rngs(params=0))
    graph, params = nnx.split(module)
    x_BTD, dy_BTD = jax.random.normal(jax.random.key(1), (2, B, T, D), jnp.float64)
    mask_BT = jnp.arange(T) < jnp.array([T, 5, T, 1])[:, None]
    keys_B = jax.random.split(jax.random.key(2), B)

    @jax.jit
    def run(params, x_BTD):
        tokens_BT = jnp.zeros((B, T), jnp.int32)
        context = MoEContext(tokens_BT, mask_BT, keys_B, mesh, True, group_rows=ROWS)

        def loss(params, x_BTD):
            y_BTD, aux = nnx.merge(graph, params)(x_BTD, context)
            return (y_BTD * dy_BTD).sum(), (y_BTD, aux)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x_BTD)

    (_, made), gradients = run(params, x_BTD)
    return made, gradients


PAIRS = [*((priority, "top_k") for priority in PRIORITIES), ("token", "soft")]


# By default: one pair on each mesh of two devices.  The lifecycle stage runs all pairs on one
# device, --full the rest.
@pytest.mark.parametrize(
    ("sizes", "priority", "router"),
    [
        *(pytest.param({}, *pair, marks=pytest.mark.lifecycle) for pair in PAIRS),
        ({"data": 2}, "batch", "top_k"),
        ({"tensor": 2}, "token", "soft"),
        *(
            pytest.param(sizes, *pair, marks=pytest.mark.full)
            for sizes, here in (
                ({"data": 2}, ("batch", "top_k")),
                ({"tensor": 2}, ("token", "soft")),
            )
            for pair in PAIRS
            if pair != here
        ),
    ],
)
def test_packed_rows_are_the_slots(mesh_of, monkeypatch, sizes, priority, router):
    mesh = mesh_of(**sizes)
    (y_BTD, aux), gradients = forward_backward(mesh, priority, router)
    asked = []
    monkeypatch.setattr(
        Experts, "has_grouped_kernel", lambda self, rows: asked.append(rows) or True
    )
    (packed_BTD, packed_aux), packed_gradients = forward_backward(mesh, priority, router)
    assert asked  # the second run took the fast path
    kept = aux.stats.outcomes.kept
    assert 0 < kept < aux.stats.assignments and packed_aux.stats.outcomes.kept == kept
    np.testing.assert_allclose(packed_BTD, y_BTD, rtol=0, atol=1e-13)
    for found, expected in zip(
        jax.tree.leaves(packed_gradients), jax.tree.leaves(gradients), strict=True
    ):
        assert np.asarray(expected).any()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("dispatch", "top_k", "sizes"),
    [
        ("capacity", 2, {}),
        ("dropless", 2, {}),
        pytest.param("dropless", 2, {"expert": 2}, marks=pytest.mark.full),
        ("dropless", 3, {"expert": 2}),  # K is larger than the experts per shard
    ],
)
def test_rows_of_nobody_reach_no_gradient(mesh_of, monkeypatch, dispatch, top_k, sizes):
    """Padding rows may hold anything, from dispatch to the activation's gradients: here NaN.

    They belong to dropped assignments, padding tokens and other shards; the kernels do not write
    them.
    """

    def rows_of_nobody(rows, used):
        past = jnp.arange(len(rows)) >= used
        return jnp.where(past.reshape(-1, *[1] * (rows.ndim - 1)), jnp.nan, rows)

    def product(x_ND, w_EDF, sizes_E):
        return rows_of_nobody(grouped_matmul(x_ND, w_EDF, sizes_E), sizes_E.sum())

    def gathered(x_ND, token_M, place_NK):
        assert place_NK.shape == (len(x_ND), top_k)
        return rows_of_nobody(plain_gather(x_ND, token_M, place_NK), (token_M < len(x_ND)).sum())

    def activated(name, h_NH, weights_N, used=None):
        a_NF = plain_forward(name, h_NH, weights_N)
        return a_NF if used is None else rows_of_nobody(a_NF, used)

    def activation_gradients(name, da_NF, h_NH, weights_N, used):
        made = plain_backward(name, da_NF, h_NH, weights_N)
        return tuple(rows_of_nobody(rows, used) for rows in made)

    plain_gather, matmul = moves._take_rows, experts._MATMUL["compute"]
    plain_forward = expert_activation.plain_forward
    plain_backward = expert_activation.plain_backward
    monkeypatch.setattr(Experts, "has_grouped_kernel", lambda self, rows: True)
    run = functools.partial(
        forward_backward, mesh_of(**sizes), "token", "top_k", dispatch=dispatch, top_k=top_k
    )
    (y_BTD, _), gradients = run()
    monkeypatch.setitem(experts._MATMUL, "compute", matmul._replace(multiply=product))
    monkeypatch.setattr(moves, "_take_rows", gathered)
    monkeypatch.setattr(expert_activation, "plain_forward", activated)
    monkeypatch.setattr(expert_activation, "plain_backward", activation_gradients)
    (found_BTD, _), found = run()
    # XLA fuses the sums of the two programs differently.
    same = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-14)
    jax.tree.map(same, (found_BTD, found), (y_BTD, gradients))


def test_only_packed_rows_may_leave_places_unwritten():
    """Slots are multiplied, and send buffers sent, with their padding rows: NaN would spread."""
    ids_GN = jnp.array([[0, 1, 3, 4]])
    slots = slot_moves(ids_GN, 4, 2, PriorityOrder("token", 1, 1))
    sent, _ = shard_moves(ids_GN[0], 4, PriorityOrder("token", 1, 1), 2, 3)
    packed, _ = sorted_indices(ids_GN[0], 4, 1)
    assert (slots.zero_fill, sent.zero_fill, packed.zero_fill) == (True, True, False)


def test_slots_stay_where_they_are_fewer_than_the_choices(mesh_of, monkeypatch):
    """If experts choose, every token has E assignments, so sorted rows would be more than slots."""
    monkeypatch.setattr(Experts, "has_grouped_kernel", lambda self, rows: pytest.fail("asked"))
    (_, aux), _ = forward_backward(mesh_of(), "token", "expert_choice")
    assert aux.stats.outcomes.kept > 0


def test_slots_stay_where_tokens_travel(mesh_of, monkeypatch):
    """An all-to-all needs buffers of a fixed size."""
    monkeypatch.setattr(Experts, "has_grouped_kernel", lambda self, rows: pytest.fail("asked"))
    (_, aux), _ = forward_backward(mesh_of(expert=2), "token", "top_k")
    assert aux.stats.outcomes.kept > 0
