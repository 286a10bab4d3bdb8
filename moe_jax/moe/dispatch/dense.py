"""Every expert on every token: the oracle of all other paths, at E/K times their FLOPs.

Axes: G routing groups, S tokens per group, K assignments per token, N = G*S tokens, D width.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.moe.dispatch_types import DispatchIn, ExpertFunctions, LayerSizes
from moe_jax.moe.types import TokenChoice


@dataclasses.dataclass(frozen=True)
class Dense:
    """Dispatch without buffers or drops: y = sum_e weight_e * expert_e(x).

    Reference: Shazeer et al., arXiv 1701.06538, equation 1.
    """

    @property
    def drop_cause(self) -> str:
        """The field dropped_capacity, which stays 0 because nothing is dropped."""
        return "dropped_capacity"

    @property
    def drops(self) -> bool:
        """False: nothing is dropped."""
        return False

    @property
    def grouped(self) -> bool:
        """False: each expert multiplies all tokens."""
        return False

    @property
    def weighs_hidden(self) -> bool:
        """False: the outputs are weighted."""
        return False

    def lookahead(self, sizes: LayerSizes) -> str:
        """Empty: no token affects another token's experts."""
        return ""

    def buffer_rows(self, sizes: LayerSizes) -> int:
        """The rows that all experts read: every token once per expert.

        One expert runs at a time.
        """
        return sizes.tokens * sizes.experts

    def exchange(self, sizes: LayerSizes) -> None:
        """None: tokens stay on their device, which gets the weights of all experts."""
        return None

    def capacity(self, tokens: int, choices: int, num_experts: int, train: bool) -> None:
        """None: an expert has no capacity."""
        return None

    def __call__(
        self, x_GSD: jax.Array, choice: TokenChoice, experts: ExpertFunctions, inputs: DispatchIn
    ) -> tuple[jax.Array, jax.Array]:
        """See `types.Dispatch`."""
        kept_GSK = choice.valid_GSK & inputs.mask_GS[..., None]
        weights_GSK = jnp.where(kept_GSK, choice.weights_GSK, 0)
        return _every_expert(x_GSD, choice.ids_GSK, weights_GSK, experts), kept_GSK


def _every_expert(x_GSD, ids_GSK, weights_GSK, experts):
    """Run the experts one by one, each recomputed in the backward pass.

    Running them at once, or saving their activations, would need E times the memory of one.
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
