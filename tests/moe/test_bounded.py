"""Capacity, and the assignments that get slots, against a loop that assigns slots one by one."""

import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.moe.config import PRIORITIES
from moe_jax.moe.dispatch.bounded import (
    BoundedDispatch,
    PriorityOrder,
    expert_capacity,
    within_capacity,
)
from moe_jax.moe.dispatch.capacity import slot_moves
from moe_jax.moe.types import TokenChoice


@pytest.mark.parametrize(
    ("tokens", "choices", "factor", "experts", "slots"),
    [
        (4096, 2, 1.25, 64, 160),
        (4096, 1, 1.25, 64, 80),
        (4096, 2, 1.0, 64, 128),
        (4096, 2, 2.0, 64, 256),
        (10, 1, 1.1, 1, 10),  # never more than the tokens
        (100, 1, 1.1, 10, 11),  # exactly 1.1 * 10: float arithmetic gives 12
        (1000, 1, 1.1, 100, 11),
        (256, 2, 1.25, 128, 5),
        (100, 1, 1.0, 7, 15),  # rounded up
        (4, 1, 1.0, 64, 1),  # at least one
        (64, 8, 100.0, 8, 64),
    ],
)
def test_capacity_in_tokens(tokens, choices, factor, experts, slots):
    assert expert_capacity(tokens, choices, factor, experts) == slots


@given(
    tokens=st.integers(1, 2**20),
    choices=st.integers(1, 16),
    hundredths=st.integers(1, 1000),
    experts=st.integers(1, 2048),
)
def test_capacity_is_the_exact_ceiling(tokens, choices, hundredths, experts):
    exact = math.ceil(Fraction(hundredths * tokens * choices, 100 * experts))
    found = expert_capacity(tokens, choices, hundredths / 100, experts)
    assert found == min(tokens, max(1, exact))


def test_token_priority_takes_positions_then_rows_each_with_all_choices():
    """Assignments are numbered by row, then position, then choice."""
    numbers = jnp.arange(2 * 3 * 2)[None]  # 2 rows, 3 positions, 2 choices
    found = PriorityOrder("token", rows=2, choices=2).take(numbers)[0]
    assert found.tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]


def test_choice_priority_takes_all_first_choices_first():
    numbers = jnp.arange(2 * 3 * 2)[None]
    found = PriorityOrder("choice", rows=2, choices=2).take(numbers)[0]
    assert found.tolist() == [0, 6, 2, 8, 4, 10, 1, 7, 3, 9, 5, 11]


def test_batch_priority_takes_all_first_choices_first_by_weight():
    """Largest weights 0.5, 0.9, 0.5 (0.8 was not sampled), padding: tokens 1, 0, 2, 3."""
    numbers = jnp.arange(4 * 2)[None]
    choice = TokenChoice(
        jnp.zeros((1, 4, 2), jnp.int32),
        jnp.array([[[0.5, 0.1], [0.2, 0.9], [0.5, 0.8], [1.0, 1.0]]]),
        jnp.array([[[True, True], [True, True], [True, False], [True, True]]]),
    )
    mask_GS = jnp.array([[True, True, True, False]])
    first = BoundedDispatch(priority="batch").first_tokens(choice, mask_GS)
    assert first is not None
    assert first.tolist() == [[1, 0, 2, 3]]
    for rows in (1, 2):
        found = PriorityOrder("batch", rows, 2, first).take(numbers)[0]
        assert found.tolist() == [2, 0, 4, 6, 3, 1, 5, 7]
    assert BoundedDispatch(priority="choice").first_tokens(choice, mask_GS) is None


def shuffled_tokens(priority, groups, tokens):
    """Values of `PriorityOrder.tokens_GS`: a random permutation for `batch`, else None."""
    rng = np.random.default_rng(0)
    order = np.stack([rng.permutation(tokens) for _ in range(groups)])
    return jnp.asarray(order) if priority == "batch" else None


@pytest.mark.parametrize("priority", PRIORITIES)
def test_undo_is_the_inverse_of_take(priority):
    numbers = jnp.arange(2 * 24).reshape(2, 24)
    order = PriorityOrder(priority, 3, 2, shuffled_tokens(priority, 2, 12))
    assert (order.take(numbers) != numbers).any()
    np.testing.assert_array_equal(order.undo(order.take(numbers)), numbers)


def hand_out(ids_GN, experts, capacity, order: PriorityOrder):
    """Assign slots one by one: slot[g][n] is (expert, its slot) or None."""
    slots, rows, choices = [], order.rows, order.choices
    for g, ids in enumerate(ids_GN):
        positions = len(ids) // (rows * choices)
        axes = {"t": range(positions), "r": range(rows), "k": range(choices)}
        if order.priority == "batch":
            axes = {"s": np.asarray(order.tokens_GS)[g], "k": range(choices)}
        by = {"token": "trk", "choice": "ktr", "batch": "ks"}[order.priority]
        given, slot = [0] * experts, [None] * len(ids)
        for index in itertools.product(*(axes[name] for name in by)):
            at = dict(zip(by, index, strict=True))
            s = at["s"] if "s" in at else at["r"] * positions + at["t"]
            n = s * choices + at["k"]
            e = ids[n]
            if e < experts and given[e] < capacity:
                slot[n] = (e, given[e])
                given[e] += 1
        slots.append(slot)
    return slots


@pytest.mark.lifecycle
@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    shape=st.sampled_from([(1, 1, 6, 2, 3), (2, 2, 4, 1, 4), (3, 2, 3, 2, 5)]),
    capacity=st.sampled_from([1, 2, 5]),
    priority=st.sampled_from(PRIORITIES),
)
def test_slots_are_handed_out_in_priority_order(data, shape, capacity, priority):
    """The id E means no expert: padding, or an unsampled assignment."""
    G, rows, positions, K, E = shape
    N = rows * positions * K
    ids = data.draw(st.lists(st.integers(0, E), min_size=G * N, max_size=G * N))
    ids_GN = np.array(ids, np.int32).reshape(G, N)
    order = PriorityOrder(priority, rows, K, shuffled_tokens(priority, G, rows * positions))
    # Compiled for each of the few shapes, because eager execution takes ten times as long.
    moves = jax.jit(lambda ids_GN: slot_moves(ids_GN, E, capacity, order))(ids_GN)
    kept_GN = jax.jit(lambda ids_GN: within_capacity(ids_GN, E, capacity, order))(ids_GN)
    place_GN, assignment_M = (
        np.asarray(moves.place_NK).reshape(G, N),
        np.asarray(moves.assignment_M),
    )
    expected_assignment_M = np.full(E * G * capacity, G * N)
    for g, slots in enumerate(hand_out(ids_GN, E, capacity, order)):
        for n, slot in enumerate(slots):
            place = E * G * capacity if slot is None else (slot[0] * G + g) * capacity + slot[1]
            assert place_GN[g, n] == place
            assert kept_GN[g, n] == (slot is not None)
            if slot is not None:
                expected_assignment_M[place] = g * N + n
    np.testing.assert_array_equal(assignment_M, expected_assignment_M)
    np.testing.assert_array_equal(moves.token_M, expected_assignment_M // K)
