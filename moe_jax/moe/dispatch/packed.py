"""Runs the experts of one device on rows sorted by expert, without slots.

Axes: N tokens, K assignments per token, A = N*K assignments, M buffer rows, D width, E experts.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.moe.dispatch.moves import (
    DispatchIndices,
    combine,
    gather_tokens,
    gather_weights,
    sort_by_expert,
)
from moe_jax.moe.dispatch_types import ExpertFunctions
from moe_jax.nn.remat import MOE_DISPATCHED


def run_sorted_experts(
    x_ND: jax.Array, ids_NK: jax.Array, weights_NK: jax.Array, experts: ExpertFunctions
):
    """Compute the weighted sum of each token's local expert outputs: [N, D].

    Other ids add nothing.
    """
    K, local = ids_NK.shape[1], experts.num_experts
    moves, sizes_E = sorted_indices(ids_NK.reshape(-1), local, K)
    # At most `local` of a token's assignments are to experts of this device, whatever K is.
    moves = dataclasses.replace(
        moves,
        token_M=moves.token_M[: x_ND.shape[0] * local],
        assignment_M=moves.assignment_M[: x_ND.shape[0] * local],
    )
    moves, sizes_E = checkpoint_name((moves, sizes_E), MOE_DISPATCHED)
    x_MD = checkpoint_name(gather_tokens(x_ND, moves), MOE_DISPATCHED)
    weights_M = checkpoint_name(gather_weights(weights_NK, moves), MOE_DISPATCHED)
    y_MD = experts.grouped(x_MD, sizes_E, weights_M)
    with jax.named_scope("combine"):
        return combine(y_MD, moves)


def expert_starts(ids_A: jax.Array, num_experts: int) -> jax.Array:
    """The sorted position at which each expert's assignments begin: [E + 1]."""
    return (ids_A[None, :] < jnp.arange(num_experts + 1)[:, None]).sum(-1, dtype=jnp.int32)


def invert_permutation(order_A: jax.Array) -> jax.Array:
    numbers = jnp.arange(order_A.shape[0], dtype=jnp.int32)
    return jnp.zeros_like(order_A).at[order_A].set(numbers)


def sorted_indices(
    ids_A: jax.Array, num_experts: int, choices: int
) -> tuple[DispatchIndices, jax.Array]:
    """The indices that sort A assignments by expert (id `num_experts`: none), and expert sizes.

    Rows >= the sum of the sizes are padding; they must not reach a result.
    """
    A = ids_A.shape[0]
    start_E = expert_starts(ids_A, num_experts)
    order_A = sort_by_expert(ids_A[None], num_experts)[0]
    assignment_M = jnp.where(jnp.arange(A) < start_E[-1], order_A, A)
    place_A = jnp.where(ids_A < num_experts, invert_permutation(order_A), A)
    place_NK = place_A.reshape(-1, choices)
    indices = DispatchIndices(assignment_M // choices, assignment_M, place_NK, zero_fill=False)
    return indices, jnp.diff(start_E)
