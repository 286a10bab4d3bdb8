"""Softmax top-k routing: Mixtral (arXiv 2401.04088), OLMoE (2409.02060), Qwen3-MoE (2505.09388).

Axes: G routing groups, S tokens per group, E experts, K assignments per token.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.decides import Training
from moe_jax.errors import UserError
from moe_jax.moe.routers.linear import LinearRouter, top_choices
from moe_jax.moe.types import RouterIn, TokenChoice


@dataclasses.dataclass(frozen=True)
class TopK(LinearRouter):
    """The K most probable experts under the softmax over all of them.

    Raises:
      UserError: renormalized weights with K = 1, which give the router no gradient.

    Reference: Mixtral, arXiv 2401.04088; OLMoE, arXiv 2409.02060; Qwen3, arXiv 2505.09388.
    """

    top_k: int = 2  # K, experts per token
    # True: the K weights sum to 1 (Mixtral, Qwen3-MoE).  False: they are probabilities under the
    # softmax over all experts (OLMoE).
    renormalize: Training[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.renormalize and self.top_k == 1:
            raise UserError(
                "model.moe.options.top_k.renormalize is True with top_k 1: every weight is 1 and "
                "the router gets no gradient. Set renormalize=False or router switch."
            )

    @property
    def choices_per_token(self) -> int:
        """K, experts per token."""
        return self.top_k

    def route(self, inputs: RouterIn, params, state):
        """Choose K experts; see `types.Router`."""
        logits_GSE = self.logits(inputs, params["kernel"])
        probs_GSE = jax.nn.softmax(logits_GSE, axis=-1)
        weights_GSK, ids_GSK = top_choices(probs_GSE, self.top_k)
        if self.renormalize:
            weights_GSK = weights_GSK / weights_GSK.sum(-1, keepdims=True)
        choice = TokenChoice(ids_GSK, weights_GSK, jnp.ones(ids_GSK.shape, bool))
        return choice, self.aux(inputs, logits_GSE, probs_GSE, ids_GSK)
