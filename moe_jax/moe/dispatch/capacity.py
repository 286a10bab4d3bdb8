"""The default path: dispatch by gather into slots, batched matmul, combine by gather.

Axes: G routing groups, S tokens per group, K assignments per token, E experts, C slots per expert
per group, M = E*G*C slots, D width.

A sort of the group's assignments by expert gives every slot its token and every assignment its
slot, so memory and time are linear in tokens: there is no [S, E, C] array, and dispatch, combine
and their backward passes are gathers (`moves`).

Fast path on one expert shard: if the grouped matmul has a kernel as fast as a batched one
(`ExpertFunctions.has_grouped_kernel`) and S*K <= E*C, kept assignments are sorted by expert
(`run_sorted_experts`) and no slot buffer is allocated, so no empty slots are multiplied.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.moe.dispatch.bounded import (
    BoundedDispatch,
    PriorityOrder,
    ranked,
    routed_ids,
    within_capacity,
)
from moe_jax.moe.dispatch.moves import DispatchIndices, combine, gather_tokens, gather_weights
from moe_jax.moe.dispatch.packed import run_sorted_experts
from moe_jax.moe.dispatch.region import expert_region
from moe_jax.moe.dispatch_types import DispatchIn, ExpertFunctions
from moe_jax.moe.types import TokenChoice
from moe_jax.nn.remat import MOE_DISPATCHED
from moe_jax.parallel.collectives import from_experts, to_experts


@dataclasses.dataclass(frozen=True)
class Capacity(BoundedDispatch):
    """Bounded slots per expert per routing group; expert parallelism by all-to-all.

    Reference: GShard, arXiv 2006.16668; Switch, arXiv 2101.03961.
    """

    @property
    def weighs_hidden(self) -> bool:
        """True: the combine weights are sent to the experts with the tokens."""
        return True

    def __call__(
        self, x_GSD: jax.Array, choice: TokenChoice, experts: ExpertFunctions, inputs: DispatchIn
    ) -> tuple[jax.Array, jax.Array]:
        """See `types.Dispatch`."""
        E, shards = experts.num_experts, inputs.expert_shards

        def body(x_GSD, choice, experts, mask_GS, tokens_GS):
            G, S, D = x_GSD.shape
            K = choice.ids_GSK.shape[2]
            C = self.slots(S, K, E, inputs)
            ids_GN = routed_ids(choice, mask_GS, E)
            order = PriorityOrder(self.priority, inputs.rows, K, tokens_GS)
            if shards == 1 and S * K <= E * C and experts.has_grouped_kernel(G * S * K):
                kept_GN = within_capacity(ids_GN, E, C, order)
                ids_NK = jnp.where(kept_GN, ids_GN, E).reshape(G * S, K)
                weights_NK = choice.weights_GSK.reshape(G * S, K)
                y_ND = run_sorted_experts(x_GSD.reshape(G * S, D), ids_NK, weights_NK, experts)
                return y_ND.reshape(G, S, D), kept_GN.reshape(G, S, K)
            moves = slot_moves(ids_GN, E, C, order)
            # A policy that saves x_END saves the indices too, so remat does not repeat the sort.
            moves = checkpoint_name(moves, MOE_DISPATCHED)
            x_MD = gather_tokens(x_GSD.reshape(G * S, D), moves)
            x_END = to_experts(x_MD.reshape(E, G * C, D), "expert", shards)
            weights_M = gather_weights(choice.weights_GSK.reshape(G * S, K), moves)
            weights_EN = to_experts(weights_M.reshape(E, G * C), "expert", shards)
            x_END, weights_EN = checkpoint_name((x_END, weights_EN), MOE_DISPATCHED)
            y_END = from_experts(experts.batched(x_END, weights_EN), "expert", shards)
            with jax.named_scope("combine"):
                y_ND = combine(y_END.reshape(E * G * C, D), moves)
            kept_GSK = (moves.place_NK < E * G * C).reshape(G, S, K)
            return y_ND.reshape(G, S, D), kept_GSK

        tokens_GS = self.first_tokens(choice, inputs.mask_GS)
        return expert_region(body, x_GSD, choice, experts, inputs, tokens_GS)


def slot_moves(
    ids_GN: jax.Array, num_experts: int, capacity: int, order: PriorityOrder
) -> DispatchIndices:
    """The indices that move G groups into slots [E, G, C]; ids_GN holds experts (E: none)."""
    G, N = ids_GN.shape
    E, C, K = num_experts, capacity, order.choices
    p_ids_GN = order.take(ids_GN)
    order_GN, start_GE, c_GN = ranked(p_ids_GN, E)

    # Slot (e, c) holds the c-th assignment of expert e in priority order.
    sorted_GEC = start_GE[:, :E, None] + jnp.arange(C, dtype=jnp.int32)
    filled_GEC = sorted_GEC < start_GE[:, 1:, None]
    number_GN = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (G, N))
    assignment_GN = jnp.take_along_axis(order.take(number_GN), order_GN, axis=1)
    group_G11 = jnp.arange(G, dtype=jnp.int32)[:, None, None]
    found_GEC = jnp.take_along_axis(
        assignment_GN, jnp.minimum(sorted_GEC, N - 1).reshape(G, E * C), axis=1
    ).reshape(G, E, C)
    assignment_GEC = jnp.where(filled_GEC, found_GEC + group_G11 * N, G * N)
    assignment_M = assignment_GEC.swapaxes(0, 1).reshape(-1)

    # Assignment (g, n) gets slot c = its rank among its expert's assignments, if c < C.
    place_GN = (p_ids_GN * G + group_G11[..., 0]) * C + c_GN
    place_GN = jnp.where((p_ids_GN < E) & (c_GN < C), place_GN, E * G * C)
    place_NK = order.undo(place_GN).reshape(G * N // K, K)
    place_NK = place_NK.astype(jnp.int32)
    return DispatchIndices(
        assignment_M // K, assignment_M, place_NK, zero_fill=True
    )  # empty slots are multiplied too
