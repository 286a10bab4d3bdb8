"""Dispatch without capacity: sort by expert, grouped matmul (MegaBlocks, arXiv 2211.15841).

Axes: N tokens, K assignments per token, M buffer rows, D width, E experts, P expert shards, R rows
sent to one shard.

On one expert shard: sort the assignments by expert, gather, grouped matmul, combine.

On several shards, `recv_factor` 0: all-gathers tokens over `expert`, computes the local experts'
weighted outputs, and psum-scatters the sums.  Each token is sent once to every other shard.  (In an
all-to-all without drops, the buffer for each destination would need rows for all assignments of a
device: K times as much.)

On several shards with a bound: each device has a send buffer of fixed size for each destination.
Assignments enter it in the token order of `bounded`, which is causal, and are sent sorted by
expert.  The receiver sorts them by local expert, and returns the outputs in the order received.
"""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Int

from moe_jax import bounds
from moe_jax.bounds import Limit
from moe_jax.decides import Training
from moe_jax.moe.dispatch.bounded import PriorityOrder, routed_ids, within_capacity
from moe_jax.moe.dispatch.moves import (
    DispatchIndices,
    combine,
    gather_tokens,
    gather_weights,
    sort_by_expert,
)
from moe_jax.moe.dispatch.packed import (
    expert_starts,
    invert_permutation,
    run_sorted_experts,
    sorted_indices,
)
from moe_jax.moe.dispatch.region import expert_region
from moe_jax.moe.dispatch_types import DispatchIn, Exchange, ExpertFunctions, LayerSizes
from moe_jax.moe.types import TokenChoice
from moe_jax.nn.remat import MOE_DISPATCHED
from moe_jax.parallel.collectives import from_experts, to_experts

RECV_FACTOR = Limit("0 (never drops) or 1 or more", lambda factor: factor == 0 or factor >= 1)


@dataclasses.dataclass(frozen=True)
class Dropless:
    """Dispatch that keeps every sampled assignment of a real token, unless `recv_factor` is set.

    A bound saves memory, and traffic between many shards, but drops then depend on the mesh;
    overflow is counted as `dropped_buffer`.  Earlier positions enter the buffers first, whatever
    `priority` is, so no later token evicts an earlier one.

    Raises:
      UserError: a recv_factor that is neither 0 nor at least 1.

    Reference: MegaBlocks, arXiv 2211.15841.
    """

    # Receive buffer rows per expert shard, in multiples of a balanced load; 0: no bound, no drops.
    recv_factor: Training[Annotated[float, RECV_FACTOR]] = 0.0

    def __post_init__(self):
        bounds.check(self, "model.moe.options.dropless.")

    @property
    def drop_cause(self) -> str:
        """Overflow of a receive buffer that `recv_factor` bounds."""
        return "dropped_buffer"

    @property
    def drops(self) -> bool:
        """True if `recv_factor` bounds the receive buffer."""
        return self.recv_factor > 0

    @property
    def grouped(self) -> bool:
        """True: the experts multiply consecutive rows."""
        return True

    @property
    def weighs_hidden(self) -> bool:
        """True: the combine weights are sorted with the rows."""
        return True

    def lookahead(self, sizes: LayerSizes) -> str:
        """Empty: an overflow drops the last positions."""
        return ""

    def buffer_rows(self, sizes: LayerSizes) -> int:
        """Rows from all shards; without a bound, rows for all assignments of the local experts."""
        shards = sizes.expert_shards
        if self.recv_factor == 0:
            return shards * sizes.tokens * min(sizes.choices, sizes.experts // shards)
        return shards * _rows_per_peer(sizes.tokens * sizes.choices, shards, self.recv_factor)

    def exchange(self, sizes: LayerSizes) -> Exchange | None:
        """Without a bound, shards all-gather the tokens and reduce-scatter their outputs."""
        if sizes.expert_shards == 1:
            return None
        if self.recv_factor == 0:
            return Exchange("all-gather", "reduce-scatter", sizes.tokens)
        return Exchange("all-to-all", "all-to-all", self.buffer_rows(sizes))

    def capacity(self, tokens: int, choices: int, num_experts: int, train: bool) -> None:
        """None: an expert has no capacity."""
        return None

    def __call__(
        self, x_GSD: jax.Array, choice: TokenChoice, experts: ExpertFunctions, inputs: DispatchIn
    ) -> tuple[jax.Array, jax.Array]:
        """See `types.Dispatch`."""
        E, shards = experts.num_experts, inputs.expert_shards

        def body(x_GSD, choice, experts, mask_GS):
            G, S, D = x_GSD.shape
            K = choice.ids_GSK.shape[2]
            ids_NK = routed_ids(choice, mask_GS, E).reshape(G * S, K)
            x_ND, weights_NK = x_GSD.reshape(G * S, D), choice.weights_GSK.reshape(G * S, K)
            if shards == 1 or self.recv_factor == 0:
                combined = run_sorted_experts if shards == 1 else _all_gather_experts
                y_ND, kept_NK = combined(x_ND, ids_NK, weights_NK, experts), ids_NK < E
            else:
                room = _rows_per_peer(G * S * K, shards, self.recv_factor)
                order = PriorityOrder("token", G * inputs.rows, K)  # over all rows on this device
                moves, sizes_E = shard_moves(ids_NK.reshape(-1), E, order, shards, room)
                moves = checkpoint_name(moves, MOE_DISPATCHED)
                y_ND = _all_to_all_experts(x_ND, weights_NK, moves, sizes_E, experts, shards)
                kept_NK = moves.place_NK < shards * room
            return y_ND.reshape(G, S, D), kept_NK.reshape(G, S, K)

        return expert_region(body, x_GSD, choice, experts, inputs)


def _rows_per_peer(assignments: int, shards: int, recv_factor: float) -> int:
    """Rows that one device may send to one other device."""
    return min(assignments, math.ceil(assignments * recv_factor / shards))


def _all_gather_experts(
    x_ND: jax.Array, ids_NK: jax.Array, weights_NK: jax.Array, experts: ExpertFunctions
):
    """Sum over shards of the local experts' weighted outputs for all tokens of the axis: [N, D]."""
    local = experts.num_experts
    x_ND, ids_NK, weights_NK = (
        jax.lax.all_gather(part, "expert", tiled=True) for part in (x_ND, ids_NK, weights_NK)
    )
    ids_NK = ids_NK - jax.lax.axis_index("expert") * local
    ids_NK = jnp.where((ids_NK >= 0) & (ids_NK < local), ids_NK, local)
    y_ND = run_sorted_experts(x_ND, ids_NK, weights_NK, experts)
    return jax.lax.psum_scatter(y_ND, "expert", scatter_dimension=0, tiled=True)


def _all_to_all_experts(
    x_ND, weights_NK, moves: DispatchIndices, sizes_E, experts: ExpertFunctions, shards: int
):
    """Dispatch the send buffers by all-to-all, run the experts, and combine: [N, D]."""
    weights_M = gather_weights(weights_NK, moves)
    y_MD = _across(gather_tokens(x_ND, moves), weights_M, sizes_E, experts, shards)
    with jax.named_scope("combine"):
        return combine(y_MD, moves)


def shard_moves(
    ids_N: Int[Array, "N"], num_experts: int, order: PriorityOrder, shards: int, room: int
) -> tuple[DispatchIndices, Int[Array, "E"]]:
    """The indices of one device's send buffers [shards, room], each sorted by expert.

    The first `room` assignments to a destination in `order` get a buffer row.  If expert order
    decided, a later token of a lower-numbered expert could evict an earlier token.

    Args:
      ids_N: the expert of each of the device's assignments; `num_experts`: none.
      num_experts: E, of all shards.
      order: in which assignments get buffer rows.
      shards: destinations, each of which holds E / shards consecutive experts.
      room: buffer rows per destination.

    Returns:
      The indices, and the number of each expert's assignments that have a buffer row.
    """
    N, local = ids_N.shape[0], num_experts // shards
    sent_N = within_capacity(ids_N[None] // local, shards, room, order)[0]
    ids_N = jnp.where(sent_N, ids_N, num_experts)
    start_E = expert_starts(ids_N, num_experts)
    order_N = sort_by_expert(ids_N[None], num_experts)[0]
    begin_P, end_P = start_E[:-1:local], start_E[local::local]
    sorted_PR = begin_P[:, None] + jnp.arange(room, dtype=jnp.int32)
    assignment_PR = jnp.where(sorted_PR < end_P[:, None], order_N[jnp.minimum(sorted_PR, N - 1)], N)
    target_N = jnp.minimum(ids_N // local, shards - 1)
    place_N = target_N * room + invert_permutation(order_N) - begin_P[target_N]
    place_N = jnp.where(sent_N, place_N, shards * room)
    assignment_M, K = assignment_PR.reshape(-1), order.choices
    indices = DispatchIndices(
        assignment_M // K, assignment_M, place_N.reshape(-1, K), zero_fill=True
    )
    return indices, jnp.diff(start_E)


def _across(
    x_MD: jax.Array, weights_M: jax.Array, sizes_E: jax.Array, experts: ExpertFunctions, shards: int
) -> jax.Array:
    """Send [shards, room] rows to their experts' devices, run the experts, return the outputs."""
    M, D = x_MD.shape
    local, room = experts.num_experts, M // shards
    x_PRD = to_experts(x_MD.reshape(shards, room, D), "expert", shards)  # [1, shards*room, D]
    weights_PR = to_experts(weights_M.reshape(shards, room), "expert", shards)
    x_PRD, weights_PR = checkpoint_name((x_PRD, weights_PR), MOE_DISPATCHED)
    sizes_PE = to_experts(sizes_E.reshape(shards, local), "expert", shards).reshape(shards, local)
    sizes_PE = checkpoint_name(sizes_PE, MOE_DISPATCHED)
    # Rows of one source arrive sorted by expert, so a row's expert is the number of experts whose
    # rows end at or before it.
    ends_PE = jnp.cumsum(sizes_PE, axis=1)
    ids_PR = (jnp.arange(room)[None, :, None] >= ends_PE[:, None, :]).sum(-1, dtype=jnp.int32)
    arrive, sizes_local_E = checkpoint_name(
        sorted_indices(ids_PR.reshape(-1), local, 1), MOE_DISPATCHED
    )
    y_MD = experts.grouped(
        gather_tokens(x_PRD.reshape(M, D), arrive),
        sizes_local_E,
        gather_weights(weights_PR.reshape(M, 1), arrive),
    )
    leave = DispatchIndices(
        arrive.place_NK[:, 0], arrive.assignment_M, arrive.token_M[:, None], zero_fill=True
    )
    y_MD = gather_tokens(y_MD, leave)
    return from_experts(y_MD.reshape(1, M, D), "expert", shards).reshape(M, D)
