"""Capacity and drop order inside a routing group, for all dispatch paths with a bound.

Axes: G routing groups, S tokens per group, K assignments per token, N = S*K assignments per group,
E experts, C slots per expert per group.

A group's assignments are numbered a = s*K + k.  The priority decides which of them get slots first:
`token` ranks tokens by position, then row, each with all its assignments (strictly causal);
`choice` ranks all first assignments before any second one (GShard, Switch), so a later token can
evict an earlier token's second; `batch` does the same with the tokens sorted by their largest
weight (batch-prioritised routing, V-MoE, arXiv 2106.05974), for models that may look ahead.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from moe_jax.moe.dispatch.moves import sort_by_expert
from moe_jax.moe.dispatch_types import DispatchIn, Exchange, LayerSizes
from moe_jax.moe.types import TokenChoice

# The axes group (0), row (1), position (2), choice (3), from slowest to fastest varying.
SLOWEST_FIRST = {"token": (0, 2, 1, 3), "choice": (0, 3, 2, 1), "batch": (0, 3, 1, 2)}


@dataclasses.dataclass(frozen=True)
class PriorityOrder:
    """The priority order of each group: a permutation of its S * K assignments."""

    priority: str
    rows: int
    choices: int
    tokens_GS: Int[Array, "G S"] | None = None  # the order of the tokens; None: 0, 1, 2, ...

    def take(self, a_GN: Shaped[Array, "G N"]) -> Shaped[Array, "G N"]:
        """Permute [G, S*K] values from assignment number to priority order."""
        if self.tokens_GS is not None:
            a_GN = _take_tokens(a_GN, self.tokens_GS)
        axes = SLOWEST_FIRST[self.priority]
        return a_GN.reshape(self._shape(a_GN)).transpose(axes).reshape(a_GN.shape)

    def undo(self, a_GN: Shaped[Array, "G N"]) -> Shaped[Array, "G N"]:
        """Permute [G, S*K] values from priority order to assignment number."""
        axes, shape = SLOWEST_FIRST[self.priority], self._shape(a_GN)
        back = [axes.index(axis) for axis in range(len(axes))]
        in_order = a_GN.reshape([shape[axis] for axis in axes])
        a_GN = in_order.transpose(back).reshape(a_GN.shape)
        if self.tokens_GS is not None:
            a_GN = _take_tokens(a_GN, jnp.argsort(self.tokens_GS, axis=1))
        return a_GN

    def _shape(self, a_GN) -> tuple[int, int, int, int]:
        G, N = a_GN.shape
        return G, self.rows, N // (self.rows * self.choices), self.choices


def _take_tokens(a_GN, tokens_GS):
    """Permute the tokens by `tokens_GS`, each with all its K values."""
    G, S = tokens_GS.shape
    return jnp.take_along_axis(a_GN.reshape(G, S, -1), tokens_GS[..., None], axis=1).reshape(G, -1)


@dataclasses.dataclass(frozen=True)
class BoundedDispatch:
    """The knobs of a dispatch path with bounded slots per expert per routing group."""

    # Slots per expert per group, in multiples of a balanced load (S * K / E assignments).
    capacity_factor: float = 1.25
    eval_capacity_factor: float = 2.0  # the same in evaluation
    priority: str = "token"  # which assignments get a slot first: token | choice | batch

    @property
    def drop_cause(self) -> str:
        """The capacity: all slots of the expert in the group were taken."""
        return "dropped_capacity"

    @property
    def drops(self) -> bool:
        """True: an assignment without a slot is dropped."""
        return True

    @property
    def grouped(self) -> bool:
        """False: the slots of all experts are one batched matmul."""
        return False

    def lookahead(self, sizes: LayerSizes) -> str:
        """The name of the priority if a later token's assignment can rank before an earlier's."""
        if self.priority == "token" or (self.priority == "choice" and sizes.choices == 1):
            return ""
        return f"priority {self.priority}"

    def buffer_rows(self, sizes: LayerSizes) -> int:
        """The slots of all groups on a device."""
        slots = self.capacity(sizes.group_tokens, sizes.choices, sizes.experts, train=True)
        return sizes.tokens // sizes.group_tokens * sizes.experts * slots

    def exchange(self, sizes: LayerSizes) -> Exchange | None:
        """Dispatch and combine send all slots by all-to-all."""
        if sizes.expert_shards == 1:
            return None
        return Exchange("all-to-all", "all-to-all", self.buffer_rows(sizes))

    def slots(self, tokens: int, choices: int, num_experts: int, inputs: DispatchIn) -> int:
        """Slots per expert per group in this call: the router's bound, else `capacity`."""
        return inputs.slots or self.capacity(tokens, choices, num_experts, inputs.train)

    def capacity(self, tokens: int, choices: int, num_experts: int, train: bool) -> int:
        """Slots per expert for a group of `tokens` tokens."""
        factor = self.capacity_factor if train else self.eval_capacity_factor
        return expert_capacity(tokens, choices, factor, num_experts)

    def first_tokens(
        self, choice: TokenChoice, mask_GS: Bool[Array, "G S"]
    ) -> Int[Array, "G S"] | None:
        """`PriorityOrder.tokens_GS`: by largest weight, ties to the lower token, padding last."""
        if self.priority != "batch":
            return None
        weights_GSK = jax.lax.stop_gradient(choice.weights_GSK)
        largest_GS = jnp.where(choice.valid_GSK, weights_GSK, -jnp.inf).max(-1)
        largest_GS = jnp.where(mask_GS, largest_GS, -jnp.inf)
        return jnp.argsort(largest_GS, axis=1, stable=True, descending=True)


def expert_capacity(tokens: int, choices: int, factor: float, num_experts: int) -> int:
    """The capacity C = ceil(S * K * factor / E), at least 1 and at most S.

    Rounding errors of the factor are ignored: with factor 1.1 and S * K / E = 10, C is 11, not 12.
    """
    exact = tokens * choices * factor / num_experts
    return max(1, min(tokens, math.ceil(exact - 1e-9 * max(1.0, exact))))


def routed_ids(
    choice: TokenChoice, mask_GS: Bool[Array, "G S"], num_experts: int
) -> Int[Array, "G N"]:
    """The expert of each assignment; `num_experts` if it is unsampled or of a padding token."""
    real = choice.valid_GSK & mask_GS[..., None]
    G = choice.ids_GSK.shape[0]
    return jnp.where(real, choice.ids_GSK, num_experts).reshape(G, -1)


def within_capacity(
    ids_GN: Int[Array, "G N"], num_experts: int, capacity: int, order: PriorityOrder
) -> Bool[Array, "G N"]:
    """Mark the assignments among the first `capacity` of their expert in priority order.

    Args:
      ids_GN: the expert of each of a group's assignments; `num_experts`: none.
      num_experts: E.
      capacity: C, slots per expert per group.
      order: priority order of a group's assignments.

    Returns:
      True for assignments that get a slot, by assignment number.
    """
    p_ids_GN = order.take(ids_GN)
    c_GN = ranked(p_ids_GN, num_experts)[2]
    return order.undo((p_ids_GN < num_experts) & (c_GN < capacity))


def ranked(
    p_ids_GN: Int[Array, "G N"], num_experts: int
) -> tuple[Int[Array, "G N"], Int[Array, "G E1"], Int[Array, "G N"]]:
    """Sort a group's assignments by expert, then priority.

    Args:
      p_ids_GN: the expert of each assignment, in priority order; `num_experts`: none.
      num_experts: E.

    Returns:
      The order (sorted position -> priority rank) [G, N]; the sorted position at which each
      expert's assignments begin [G, E + 1]; and the rank of each assignment among those of its
      expert [G, N].
    """
    G, N = p_ids_GN.shape
    order_GN = sort_by_expert(p_ids_GN, num_experts)
    expert_E = jnp.arange(num_experts + 1)
    start_GE = (p_ids_GN[:, None, :] < expert_E[None, :, None]).sum(-1, dtype=jnp.int32)
    number_GN = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (G, N))
    group_G1 = jnp.arange(G, dtype=jnp.int32)[:, None]
    sorted_GN = jnp.zeros((G, N), jnp.int32).at[group_G1, order_GN].set(number_GN)
    return order_GN, start_GE, sorted_GN - jnp.take_along_axis(start_GE, p_ids_GN, axis=1)
