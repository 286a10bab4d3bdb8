"""The dense mixture (Jacobs et al., 1991; Shazeer et al., arXiv 1701.06538, without sparsity).

Axes: G routing groups, S tokens per group, E experts, K = E assignments per token.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.moe.balance import balanced_by_construction, router_aux
from moe_jax.moe.routers.linear import LinearRouter
from moe_jax.moe.types import RouterIn, TokenChoice


@dataclasses.dataclass(frozen=True)
class Soft(LinearRouter):
    """Every expert for every token (K = E), weighted by the softmax; every weight has a gradient.

    Each expert gets every token, so the balance loss is 1 without a gradient.

    Reference: Jacobs et al., 1991; Shazeer et al., arXiv 1701.06538, without its sparsity.
    """

    num_experts: int = 8  # E, experts per token

    @property
    def choices_per_token(self) -> int:
        """E, experts per token."""
        return self.num_experts

    @property
    def balanced_by_loss(self) -> bool:
        """False: every expert takes every token."""
        return False

    def route(self, inputs: RouterIn, params, state):
        """Choose every expert; see `types.Router`."""
        logits_GSE = self.logits(inputs, params["kernel"])
        probs_GSE = jax.nn.softmax(logits_GSE, axis=-1)
        expert_E = jnp.arange(probs_GSE.shape[-1], dtype=jnp.int32)
        ids_GSK = jnp.broadcast_to(expert_E, probs_GSE.shape)
        choice = TokenChoice(ids_GSK, probs_GSE, jnp.ones(ids_GSK.shape, bool))
        balance = balanced_by_construction(inputs.mask_GS, probs_GSE.dtype)
        return choice, router_aux(logits_GSE, probs_GSE, balance, inputs.mask_GS)
