"""GShard routing (Lepikhin et al., arXiv 2006.16668): top-2 with a random second expert.

Axes: G routing groups, S tokens per group, E experts, K = 2 assignments per token.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.decides import Training
from moe_jax.moe.noise import SECOND_EXPERT, row_uniform
from moe_jax.moe.routers.linear import LinearRouter, top_choices
from moe_jax.moe.types import RouterIn, TokenChoice


@dataclasses.dataclass(frozen=True)
class GShard(LinearRouter):
    """Two experts per token, with weights renormalised over the two.

    In training the second assignment is sampled with probability min(1, 2 * g2), where g2 is its
    renormalised weight; in evaluation it is always made.  The balance loss counts first assignments
    only, as in the paper.

    Reference: Lepikhin et al., arXiv 2006.16668.
    """

    # True: sample the second assignment in training.  False: always make it.
    random_second: Training[bool] = True

    @property
    def choices_per_token(self) -> int:
        """Always 2."""
        return 2

    @property
    def random(self) -> bool:
        """True if the second assignment is sampled or the input jittered."""
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
