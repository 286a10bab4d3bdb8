"""Every expert on every token: the oracle of all other paths.  E/K times the work."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.moe.dispatch_types import DispatchIn, Experts, LayerSizes
from moe_jax.moe.types import TokenChoice


@dataclasses.dataclass(frozen=True)
class Dense:
    """No transport and no drop: y = sum_e weight_e * expert_e(x).

    Reference: Shazeer et al., arXiv 1701.06538, equation 1.
    """

    @property
    def drop_cause(self) -> str:
        """Nothing is dropped."""
        return "dropped_capacity"

    @property
    def drops(self) -> bool:
        """Never."""
        return False

    @property
    def grouped(self) -> bool:
        """Each expert multiplies all tokens."""
        return False

    @property
    def weighs_hidden(self) -> bool:
        """Outputs are weighed."""
        return False

    def lookahead(self, sizes: LayerSizes) -> str:
        """No token decides about another."""
        return ""

    def buffer_rows(self, sizes: LayerSizes) -> int:
        """Every token for every expert."""
        return sizes.tokens * sizes.experts

    def exchange(self, sizes: LayerSizes) -> None:
        """Tokens stay where they are; the weights of all experts come to them."""
        return None

    def capacity(self, tokens: int, choices: int, num_experts: int, train: bool) -> None:
        """Nothing is bounded."""
        return None

    def __call__(
        self, x_GSD: jax.Array, choice: TokenChoice, experts: Experts, inputs: DispatchIn
    ) -> tuple[jax.Array, jax.Array]:
        """See `types.Dispatch`."""
        kept_GSK = choice.valid_GSK & inputs.mask_GS[..., None]
        weights_GSK = jnp.where(kept_GSK, choice.weights_GSK, 0)
        return _every_expert(x_GSD, choice.ids_GSK, weights_GSK, experts), kept_GSK


def _every_expert(x_GSD, ids_GSK, weights_GSK, experts):
    """A loop over the experts, each recomputed in the backward pass.

    All at once, or all kept, would take E times a layer's activations.
    """
    G, S, D = x_GSD.shape
    x_ND = x_GSD.reshape(G * S, D)

    @jax.checkpoint
    def add_one(y_ND, numbered):
        e, expert = numbered
        weights_GS = jnp.where(ids_GSK == e, weights_GSK, 0).sum(-1)
        one = jax.tree.map(lambda w: w[None], expert)
        out_ND = one.batched(x_ND[None])[0]
        return y_ND + out_ND * weights_GS.reshape(G * S, 1).astype(x_ND.dtype), None

    numbers_E = jnp.arange(experts.num_experts, dtype=ids_GSK.dtype)
    y_ND, _ = jax.lax.scan(add_one, jnp.zeros_like(x_ND), (numbers_E, experts))
    return y_ND.reshape(G, S, D)
