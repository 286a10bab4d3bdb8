"""Switch Transformer routing (Fedus et al., arXiv 2101.03961): top-1.

Axes: G routing groups, S tokens per group, E experts, K = 1 assignment per token.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from moe_jax.bounds import within
from moe_jax.decides import Training
from moe_jax.moe.routers.linear import LinearRouter, top_choices
from moe_jax.moe.types import RouterIn, TokenChoice


@dataclasses.dataclass(frozen=True)
class Switch(LinearRouter):
    """One expert per token, weighted by its probability under the softmax over all experts.

    A softmax after the top-1 selection would make every weight 1 and leave the router without a
    gradient from the language-model loss.

    Reference: Fedus et al., arXiv 2101.03961.
    """

    # j: in training the router's input is multiplied by U(1 - j, 1 + j); 0: off.
    jitter: Training[Annotated[float, within("[0, 1)")]] = 0.01

    @property
    def choices_per_token(self) -> int:
        """Always 1."""
        return 1

    def route(self, inputs: RouterIn, params, state):
        """Choose the most probable expert; see `types.Router`."""
        logits_GSE = self.logits(inputs, params["kernel"])
        probs_GSE = jax.nn.softmax(logits_GSE, axis=-1)
        weights_GSK, ids_GSK = top_choices(probs_GSE, 1)
        choice = TokenChoice(ids_GSK, weights_GSK, jnp.ones(ids_GSK.shape, bool))
        return choice, self.aux(inputs, logits_GSE, probs_GSE, ids_GSK)
