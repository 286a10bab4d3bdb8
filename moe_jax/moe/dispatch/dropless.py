"""Sorted tokens and a grouped matmul: nothing is dropped for capacity (MegaBlocks, 2211.15841).

On one expert shard: sort the assignments by expert, gather, grouped matmul, gather back.

Across devices, without a bound on what a shard may receive, every shard of the expert axis gets
all tokens of the axis, takes what its experts were chosen for, combines it, and the shards' sums
are added on the way home: a token travels once to each other shard.  (Buffers of an all-to-all in
which nothing may be dropped have room for all of a device's assignments at each destination, K
times as much.)  With a bound, each device has a buffer of fixed size for each destination.
Assignments enter it in the token order of `bounded`, which is causal, and travel sorted by expert;
they are sorted again by local expert on arrival, and go home the same way.
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
from moe_jax.moe.dispatch.bounded import Order, routed_ids, within_capacity
from moe_jax.moe.dispatch.moves import Moves, combine, gather_tokens, gather_weights, sort_by_expert
from moe_jax.moe.dispatch.packed import expert_starts, inverse, packed, sorted_moves
from moe_jax.moe.dispatch.region import expert_region
from moe_jax.moe.dispatch_types import DispatchIn, Exchange, Experts, LayerSizes
from moe_jax.moe.types import TokenChoice
from moe_jax.nn.remat import MOE_DISPATCHED
from moe_jax.parallel.collectives import from_experts, to_experts

RECV_FACTOR = Limit("0 (never drops) or 1 or more", lambda factor: factor == 0 or factor >= 1)


@dataclasses.dataclass(frozen=True)
class Dropless:
    """Every sampled choice of a real token reaches its expert, unless `recv_factor` is set.

    A bound saves memory, and traffic between many shards, and makes dropping depend on the mesh;
    overflow is counted as `dropped_buffer`.  Earlier positions enter the buffers first, whatever
    `priority` says, so no later token evicts an earlier one.

    Raises:
      UserError: a recv_factor that is neither 0 nor at least 1.

    Reference: MegaBlocks, arXiv 2211.15841.
    """

    # Rows of a shard's receive buffer, in multiples of an even load; 0: no bound, nothing dropped.
    recv_factor: Training[Annotated[float, RECV_FACTOR]] = 0.0

    def __post_init__(self):
        bounds.check(self, "model.moe.options.dropless.")

    @property
    def drop_cause(self) -> str:
        """A smaller receive buffer overflowed."""
        return "dropped_buffer"

    @property
    def drops(self) -> bool:
        """Only where what a shard receives is bounded."""
        return self.recv_factor > 0

    @property
    def grouped(self) -> bool:
        """The experts multiply consecutive rows."""
        return True

    @property
    def weighs_hidden(self) -> bool:
        """Weights stand beside the sorted rows."""
        return True

    def lookahead(self, sizes: LayerSizes) -> str:
        """Nothing: an overflow drops the last positions."""
        return ""

    def buffer_rows(self, sizes: LayerSizes) -> int:
        """What may come from all shards; without a bound all that the experts here can take."""
        shards = sizes.expert_shards
        if self.recv_factor == 0:
            return shards * sizes.tokens * min(sizes.choices, sizes.experts // shards)
        return shards * _room(sizes.tokens * sizes.choices, shards, self.recv_factor)

    def exchange(self, sizes: LayerSizes) -> Exchange | None:
        """Without a bound every shard gets all tokens, and shards add their outputs."""
        if sizes.expert_shards == 1:
            return None
        if self.recv_factor == 0:
            return Exchange("all-gather", "reduce-scatter", sizes.tokens)
        return Exchange("all-to-all", "all-to-all", self.buffer_rows(sizes))

    def capacity(self, tokens: int, choices: int, num_experts: int, train: bool) -> None:
        """Nothing is bounded per expert."""
        return None

    def __call__(
        self, x_GSD: jax.Array, choice: TokenChoice, experts: Experts, inputs: DispatchIn
    ) -> tuple[jax.Array, jax.Array]:
        """See `types.Dispatch`."""
        E, shards = experts.num_experts, inputs.expert_shards

        def body(x_GSD, choice, experts, mask_GS):
            G, S, D = x_GSD.shape
            K = choice.ids_GSK.shape[2]
            ids_NK = routed_ids(choice, mask_GS, E).reshape(G * S, K)
            x_ND, weights_NK = x_GSD.reshape(G * S, D), choice.weights_GSK.reshape(G * S, K)
            if shards == 1 or self.recv_factor == 0:
                combined = packed if shards == 1 else _gathered
                y_ND, kept_NK = combined(x_ND, ids_NK, weights_NK, experts), ids_NK < E
            else:
                room = _room(G * S * K, shards, self.recv_factor)
                order = Order("token", G * inputs.rows, K)  # of all rows on this device
                moves, sizes_E = shard_moves(ids_NK.reshape(-1), E, order, shards, room)
                moves = checkpoint_name(moves, MOE_DISPATCHED)
                y_ND = _exchanged(x_ND, weights_NK, moves, sizes_E, experts, shards)
                kept_NK = moves.place_NK < shards * room
            return y_ND.reshape(G, S, D), kept_NK.reshape(G, S, K)

        return expert_region(body, x_GSD, choice, experts, inputs)


def _room(assignments: int, shards: int, recv_factor: float) -> int:
    """Rows one device may send another."""
    return min(assignments, math.ceil(assignments * recv_factor / shards))


def _gathered(x_ND: jax.Array, ids_NK: jax.Array, weights_NK: jax.Array, experts: Experts):
    """[N, D]: every shard adds what its experts make of all tokens of the expert axis."""
    local = experts.num_experts
    x_ND, ids_NK, weights_NK = (
        jax.lax.all_gather(part, "expert", tiled=True) for part in (x_ND, ids_NK, weights_NK)
    )
    ids_NK = ids_NK - jax.lax.axis_index("expert") * local
    ids_NK = jnp.where((ids_NK >= 0) & (ids_NK < local), ids_NK, local)
    y_ND = packed(x_ND, ids_NK, weights_NK, experts)
    return jax.lax.psum_scatter(y_ND, "expert", scatter_dimension=0, tiled=True)


def _exchanged(x_ND, weights_NK, moves: Moves, sizes_E, experts: Experts, shards: int):
    """[N, D]: an all-to-all of the send buffers, the experts, and the way back."""
    weights_M = gather_weights(weights_NK, moves)
    y_MD = _across(gather_tokens(x_ND, moves), weights_M, sizes_E, experts, shards)
    with jax.named_scope("combine"):
        return combine(y_MD, moves)


def shard_moves(
    ids_N: Int[Array, "N"], num_experts: int, order: Order, shards: int, room: int
) -> tuple[Moves, Int[Array, "E"]]:
    """Send buffers [shards, room] of one device, each sorted by expert.

    The first `room` assignments of a destination in `order` get a place.  Giving places by expert
    would let a later token on a lower-numbered expert evict an earlier token.

    Args:
      ids_N: expert of each of the device's assignments; `num_experts`: nobody.
      num_experts: E, of all shards.
      order: who gets a place first.
      shards: destinations, each of which holds E / shards consecutive experts.
      room: places for each destination.

    Returns:
      The moves, and how many of each expert's assignments have a place.
    """
    N, local = ids_N.shape[0], num_experts // shards
    sent_N = within_capacity(ids_N[None] // local, shards, room, order)[0]
    ids_N = jnp.where(sent_N, ids_N, num_experts)
    start_E = expert_starts(ids_N, num_experts)
    order_N = sort_by_expert(ids_N[None], num_experts)[0]
    begin_P, end_P = start_E[:-1:local], start_E[local::local]
    sorted_PR = begin_P[:, None] + jnp.arange(room, dtype=jnp.int32)
    choice_PR = jnp.where(sorted_PR < end_P[:, None], order_N[jnp.minimum(sorted_PR, N - 1)], N)
    target_N = jnp.minimum(ids_N // local, shards - 1)
    place_N = target_N * room + inverse(order_N) - begin_P[target_N]
    place_N = jnp.where(sent_N, place_N, shards * room)
    choice_M, K = choice_PR.reshape(-1), order.choices
    return Moves(choice_M // K, choice_M, place_N.reshape(-1, K), zeros=True), jnp.diff(start_E)


def _across(
    x_MD: jax.Array, weights_M: jax.Array, sizes_E: jax.Array, experts: Experts, shards: int
) -> jax.Array:
    """Send [shards, room] rows to their experts' devices, apply the experts, bring them home."""
    M, D = x_MD.shape
    local, room = experts.num_experts, M // shards
    x_PRD = to_experts(x_MD.reshape(shards, room, D), "expert", shards)  # [1, shards*room, D]
    weights_PR = to_experts(weights_M.reshape(shards, room), "expert", shards)
    x_PRD, weights_PR = checkpoint_name((x_PRD, weights_PR), MOE_DISPATCHED)
    sizes_PE = to_experts(sizes_E.reshape(shards, local), "expert", shards).reshape(shards, local)
    sizes_PE = checkpoint_name(sizes_PE, MOE_DISPATCHED)
    # Rows of one source come sorted by expert: a row's expert is how many runs end at or before it.
    ends_PE = jnp.cumsum(sizes_PE, axis=1)
    ids_PR = (jnp.arange(room)[None, :, None] >= ends_PE[:, None, :]).sum(-1, dtype=jnp.int32)
    arrive, sizes_local_E = checkpoint_name(
        sorted_moves(ids_PR.reshape(-1), local, 1), MOE_DISPATCHED
    )
    y_MD = experts.grouped(
        gather_tokens(x_PRD.reshape(M, D), arrive),
        sizes_local_E,
        gather_weights(weights_PR.reshape(M, 1), arrive),
    )
    leave = Moves(arrive.place_NK[:, 0], arrive.choice_M, arrive.token_M[:, None], zeros=True)
    y_MD = gather_tokens(y_MD, leave)
    return from_experts(y_MD.reshape(1, M, D), "expert", shards).reshape(M, D)
