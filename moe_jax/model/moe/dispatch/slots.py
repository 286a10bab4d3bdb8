"""Capacity and drop order inside a routing group, shared by the bounded dispatch paths.

A group's S*K assignments are numbered a = s*K + k.  Priority decides who gets a slot first:
`token` ranks tokens by position, then row, each with all its choices (strictly causal); `choice`
ranks all first choices before any second (GShard, Switch), which lets a later token evict an
earlier one's second choice.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from moe_jax.model.moe.types import DispatchIn, TokenChoice


@dataclasses.dataclass(frozen=True)
class Slots:
    """The knobs of a dispatch path with bounded slots per expert and group."""

    capacity_factor: float = 1.25
    eval_capacity_factor: float = 2.0
    priority: str = "token"

    @property
    def drop_cause(self) -> str:
        """The expert's slots in the group were taken."""
        return "dropped_capacity"

    def slots(self, tokens: int, choices: int, num_experts: int, inputs: DispatchIn) -> int:
        """Slots of an expert in this call: the router's own bound, else `capacity`."""
        return inputs.slots or self.capacity(tokens, choices, num_experts, inputs.train)

    def capacity(self, tokens: int, choices: int, num_experts: int, train: bool) -> int:
        """Slots an expert has for a group of `tokens` tokens."""
        factor = self.capacity_factor if train else self.eval_capacity_factor
        return expert_capacity(tokens, choices, factor, num_experts)


def expert_capacity(tokens: int, choices: int, factor: float, num_experts: int) -> int:
    """Slots an expert has for a group: ceil(S * K * factor / E), at least 1 and at most S.

    The factor is read as the decimal it was written as, so that 1.1 * 10 is 11 and not 12.
    """
    exact = tokens * choices * factor / num_experts
    return max(1, min(tokens, math.ceil(exact - 1e-9 * max(1.0, exact))))


def to_priority(a_GN: jax.Array, rows: int, choices: int, priority: str) -> jax.Array:
    """[G, S*K] by assignment number -> the same values in priority order."""
    G, N = a_GN.shape
    a_GRTK = a_GN.reshape(G, rows, N // (rows * choices), choices)
    order = (0, 2, 1, 3) if priority == "token" else (0, 3, 2, 1)
    return a_GRTK.transpose(order).reshape(G, N)


def from_priority(a_GN: jax.Array, rows: int, choices: int, priority: str) -> jax.Array:
    """Inverse of `to_priority`."""
    G, N = a_GN.shape
    positions = N // (rows * choices)
    if priority == "token":
        return a_GN.reshape(G, positions, rows, choices).transpose(0, 2, 1, 3).reshape(G, N)
    return a_GN.reshape(G, choices, positions, rows).transpose(0, 3, 2, 1).reshape(G, N)


def routed_ids(
    choice: TokenChoice, mask_GS: Bool[Array, "G S"], num_experts: int
) -> Int[Array, "G N"]:
    """Expert of each assignment, `num_experts` (nobody) where it is unsampled or padding."""
    real = choice.valid_GSK & mask_GS[..., None]
    G = choice.ids_GSK.shape[0]
    return jnp.where(real, choice.ids_GSK, num_experts).reshape(G, -1)
