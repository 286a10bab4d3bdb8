"""Switch Transformer routing (Fedus et al., arXiv 2101.03961): top-1."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.errors import UserError
from moe_jax.model.moe.routers.linear import linear_aux, linear_logits, linear_params, top_choices
from moe_jax.model.moe.types import RouterIn, TokenChoice


@dataclasses.dataclass(frozen=True)
class Switch:
    """One expert a token, weighted by its probability under the softmax over all experts.

    Taking the softmax after the top-1 instead would make every weight 1 and leave the router
    without a language-model gradient.
    """

    balance_scope: str = "group"
    jitter: float = 0.01  # input noise U(1 - jitter, 1 + jitter) in training

    def __post_init__(self):
        if not 0 <= self.jitter < 1:
            raise UserError(f"switch.jitter is {self.jitter}: set it in [0, 1).")

    @property
    def choices(self) -> int:
        """Always 1."""
        return 1

    def param_specs(self, width: int, num_experts: int):
        """One [D, E] matrix."""
        return linear_params(width, num_experts)

    def route(self, inputs: RouterIn, params):
        """Choose the most probable expert; see `types.Router`."""
        logits_GSE = linear_logits(inputs, params["kernel"], self.jitter)
        probs_GSE = jax.nn.softmax(logits_GSE, axis=-1)
        weights_GSK, ids_GSK = top_choices(probs_GSE, 1)
        choice = TokenChoice(ids_GSK, weights_GSK, jnp.ones(ids_GSK.shape, bool))
        return choice, linear_aux(inputs, logits_GSE, probs_GSE, ids_GSK, self.balance_scope)
