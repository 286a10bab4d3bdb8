"""Sigmoid routing balanced by a bias instead of a loss (DeepSeek-V3, arXiv 2412.19437)."""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax import bounds
from moe_jax.bounds import Rule, above, at_least
from moe_jax.decides import Training
from moe_jax.errors import UserError
from moe_jax.moe.routers.linear import LinearRouter, top_choices
from moe_jax.moe.types import RouterIn, StateSpec, TokenChoice


@dataclasses.dataclass(frozen=True)
class SigmoidBias(LinearRouter):
    """The K largest of sigmoid(logits) + bias, weighted by the sigmoids without the bias.

    After each step an expert's bias rises by `update_rate` if it got fewer tokens than the mean
    over the whole batch and falls if it got more.  Nothing else moves it: it has no gradient.

    With `expert_groups` above 1 only the `top_groups` groups whose two best biased scores have the
    largest sum stay in the choice.  The paper's sequence-wise balance loss is
    model.moe.balance_scope=row with model.moe.balance_weight=0.0001.

    Raises:
      UserError: a knob out of range, groups that do not divide the experts or leave fewer than K,
        or renormalized weights with K = 1, which give the router no gradient.

    Reference: DeepSeek-V3, arXiv 2412.19437, equations 12 to 20.
    """

    num_experts: int = 8  # E, routed experts
    top_k: int = 2  # K, experts per token
    # Groups of neighbouring experts (8 in DeepSeek-V3).
    expert_groups: Training[Annotated[int, Rule("a divisor of num_experts")]] = 1
    # Those of them that stay in a token's choice (4 in DeepSeek-V3); together they hold K experts.
    top_groups: Training[Annotated[int, Rule("between 1 and expert_groups")]] = 1
    renormalize: Training[bool] = True  # divide the K weights by their sum
    # Multiplies the weights after that (2.5 in DeepSeek-V3).
    routed_scale: Training[Annotated[float, above(0)]] = 1.0
    # Of the bias per step; 0: it stays as it is.
    update_rate: Training[Annotated[float, at_least(0)]] = 0.001

    def __post_init__(self):
        option = "model.moe.options.sigmoid_bias"
        bounds.check(self, f"{option}.")
        groups, experts = self.expert_groups, self.num_experts
        if groups < 1 or experts % groups:
            raise UserError(
                f"{option}.expert_groups is {groups}: set a divisor of num_experts ({experts})."
            )
        if not 1 <= self.top_groups <= groups:
            raise UserError(
                f"{option}.top_groups is {self.top_groups}: set it between 1 and expert_groups "
                f"({groups})."
            )
        if self.top_groups * (experts // groups) < self.top_k:
            raise UserError(
                f"{option}.top_groups ({self.top_groups}) leaves {experts // groups} experts each, "
                f"fewer than top_k ({self.top_k}) together: raise top_groups."
            )
        if self.renormalize and self.top_k == 1:
            raise UserError(
                f"router sigmoid_bias with top_k=1 and renormalize gives every weight the same "
                f"value and the router no gradient: set {option}.renormalize=False."
            )

    @property
    def choices(self) -> int:
        """K, the experts of a token."""
        return self.top_k

    def state_specs(self, num_experts: int) -> dict[str, StateSpec]:
        """The selection bias of each expert, in units of a sigmoid."""
        return {"bias": StateSpec((num_experts,))}

    def next_state(self, state, load_LE):
        """Bias one step towards an even load; a layer without any load keeps its own."""
        load_LE = load_LE.astype(state["bias"].dtype)
        missing_LE = load_LE.mean(-1, keepdims=True) - load_LE
        return {"bias": state["bias"] + self.update_rate * jnp.sign(missing_LE)}

    def route(self, inputs: RouterIn, params, state):
        """Choose K experts by biased scores; see `types.Router`."""
        logits_GSE = self.logits(inputs, params["kernel"])
        # As logarithms, shares of a sum stay finite with their gradients where all scores are 0.
        log_scores_GSE = jax.nn.log_sigmoid(logits_GSE)
        biased_GSE = jax.lax.stop_gradient(jnp.exp(log_scores_GSE) + state["bias"])
        allowed_GSE = self.limit_groups(biased_GSE)
        log_top_GSK, ids_GSK = top_choices(log_scores_GSE, self.top_k, allowed_GSE)
        normalise = jax.nn.softmax if self.renormalize else jnp.exp
        weights_GSK = self.routed_scale * normalise(log_top_GSK)
        choice = TokenChoice(ids_GSK, weights_GSK, jnp.ones(ids_GSK.shape, bool))
        # Of scores that do not sum to 1 the balance loss would not be 1 when balanced.
        probs_GSE = jax.nn.softmax(log_scores_GSE, axis=-1)
        return choice, self.aux(inputs, logits_GSE, probs_GSE, ids_GSK)

    def limit_groups(self, biased_GSE: Float[Array, "G S E"]) -> Float[Array, "G S E"]:
        """Take the experts of the weaker groups out of the choice.

        Args:
          biased_GSE: scores with the bias.

        Returns:
          The same scores, -inf for the experts of groups that do not stay.
        """
        n = self.expert_groups
        if self.top_groups == n:
            return biased_GSE
        G, S, E = biased_GSE.shape
        best_two = jnp.sort(biased_GSE.reshape(G, S, n, E // n), axis=-1)[..., -2:]
        _, stay = top_choices(best_two.sum(-1), self.top_groups)
        stays = (stay[..., None] == jnp.arange(n)).any(-2)
        return jnp.where(jnp.repeat(stays, E // n, axis=-1), biased_GSE, -jnp.inf)
