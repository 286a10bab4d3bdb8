"""GShard routing (Lepikhin et al., arXiv 2006.16668): top-2 with a random second expert."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.decides import Training
from moe_jax.moe.noise import SECOND_EXPERT, row_uniform
from moe_jax.moe.routers.linear import LinearRouter, top_choices
from moe_jax.moe.types import RouterIn, TokenChoice


@dataclasses.dataclass(frozen=True)
class GShard(LinearRouter):
    """Two experts a token, weights renormalised over the two.

    In training the second is dispatched with probability min(1, 2 * g2), g2 its renormalised
    weight; otherwise always.  The balance loss counts first choices, as in the paper.

    Reference: Lepikhin et al., arXiv 2006.16668.
    """

    random_second: Training[bool] = True  # False: the second is always dispatched

    @property
    def choices(self) -> int:
        """Always 2."""
        return 2

    @property
    def random(self) -> bool:
        """Where the second expert is drawn, too."""
        return self.random_second or super().random

    def route(self, inputs: RouterIn, params, state):
        """Choose two experts; see `types.Router`."""
        logits_GSE = self.logits(inputs, params["kernel"])
        probs_GSE = jax.nn.softmax(logits_GSE, axis=-1)
        top_GSK, ids_GSK = top_choices(probs_GSE, 2)
        weights_GSK = top_GSK / jnp.maximum(top_GSK.sum(-1, keepdims=True), 1e-9)
        valid_GSK = jnp.ones(ids_GSK.shape, bool)
        if inputs.train and self.random_second:
            positions = ids_GSK.shape[1] // inputs.keys_GR.shape[1]
            noise_GS = row_uniform(inputs.keys_GR, SECOND_EXPERT, (positions,), weights_GSK.dtype)
            valid_GSK = valid_GSK.at[..., 1].set(noise_GS < 2 * weights_GSK[..., 1])
        choice = TokenChoice(ids_GSK, weights_GSK, valid_GSK)
        return choice, self.aux(inputs, logits_GSE, probs_GSE, ids_GSK[..., :1])
