"""Every expert on every token: the oracle of all other paths.  E/K times the work."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.model.moe.dispatch.slots import count_stats
from moe_jax.model.moe.types import DispatchIn, DispatchStats, Experts, TokenChoice


@dataclasses.dataclass(frozen=True)
class Dense:
    """No transport and no drop: y = sum_e weight_e * expert_e(x)."""

    def capacity(self, tokens: int, choices: int, num_experts: int, train: bool) -> None:
        """Nothing is bounded."""
        return None

    def __call__(
        self, x_GSD: jax.Array, choice: TokenChoice, experts: Experts, inputs: DispatchIn
    ) -> tuple[jax.Array, DispatchStats]:
        """See `types.Dispatch`."""
        kept_GSK = choice.valid_GSK & inputs.mask_GS[..., None]
        weights_GSK = jnp.where(kept_GSK, choice.weights_GSK, 0)
        y_GSD = jax.checkpoint(_every_expert)(x_GSD, choice.ids_GSK, weights_GSK, experts)
        return y_GSD, count_stats(choice, inputs.mask_GS, kept_GSK)


def _every_expert(x_GSD, ids_GSK, weights_GSK, experts):
    """Recomputed in the backward pass: E times a layer's activations would not fit."""
    G, S, D = x_GSD.shape
    E = experts.num_experts
    one_hot_GSKE = jax.nn.one_hot(ids_GSK, E, dtype=weights_GSK.dtype)
    weights_GSE = jnp.einsum("gsk,gske->gse", weights_GSK, one_hot_GSKE, precision="highest")
    y_END = experts.batched(jnp.broadcast_to(x_GSD.reshape(1, G * S, D), (E, G * S, D)))
    weights_NE = weights_GSE.reshape(G * S, E).astype(x_GSD.dtype)
    return jnp.einsum("end,ne->nd", y_END, weights_NE).reshape(G, S, D)
