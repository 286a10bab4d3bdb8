"""Sigmoid routing balanced by a bias instead of a loss (DeepSeek-V3, arXiv 2412.19437).

Axes: L layers, G routing groups, S tokens per group, E experts, K assignments per token.
"""

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

    After each step an expert's bias rises by `update_rate` if its load in the global batch was
    below the mean, and falls by it if above.  The bias has no gradient.

    With `expert_groups` above 1, a token chooses only from the `top_groups` groups whose two
    largest biased scores have the largest sums.  The paper's sequence-wise balance loss is
    model.moe.balance_scope=row with model.moe.balance_weight=0.0001.

    Raises:
      UserError: a knob out of range, groups that do not divide the experts or hold fewer than K,
        or renormalized weights with K = 1, which give the router no gradient.

    Reference: DeepSeek-V3, arXiv 2412.19437, equations 12 to 20.
    """

    num_experts: int = 8  # E, routed experts
    top_k: int = 2  # K, experts per token
    # Groups of neighbouring experts (8 in DeepSeek-V3).
    expert_groups: Training[Annotated[int, Rule("a divisor of num_experts")]] = 1
    # Groups from which a token chooses (4 in DeepSeek-V3); together they hold at least K experts.
    top_groups: Training[Annotated[int, Rule("between 1 and expert_groups")]] = 1
    renormalize: Training[bool] = True  # divide the K weights by their sum
    # Factor of the weights, applied last (2.5 in DeepSeek-V3).
    routed_scale: Training[Annotated[float, above(0)]] = 1.0
    # Change of the bias per step; 0: the bias is constant.
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
                f"{option}.top_groups is {self.top_groups}: groups of {experts // groups} experts "
                f"hold fewer than top_k ({self.top_k}) together. Set a larger top_groups."
            )
        if self.renormalize and self.top_k == 1:
            raise UserError(
                f"{option}.renormalize is True with top_k 1: every weight is the same and the "
                f"router gets no gradient. Set {option}.renormalize=False."
            )

    @property
    def choices_per_token(self) -> int:
        """K, experts per token."""
        return self.top_k

    @property
    def balanced_by_loss(self) -> bool:
        """True only if the bias is constant."""
        return self.update_rate == 0

    def state_specs(self, num_experts: int) -> dict[str, StateSpec]:
        """The selection bias of each expert, in units of a sigmoid."""
        return {"bias": StateSpec((num_experts,))}

    def next_state(self, state, load_LE):
        """Move the bias one step towards a balanced load; a layer without load keeps its bias."""
        load_LE = load_LE.astype(state["bias"].dtype)
        missing_LE = load_LE.mean(-1, keepdims=True) - load_LE
        return {"bias": state["bias"] + self.update_rate * jnp.sign(missing_LE)}

    def route(self, inputs: RouterIn, params, state):
        """Choose K experts by biased scores; see `types.Router`."""
        logits_GSE = self.logits(inputs, params["kernel"])
        # Use log-sigmoids: weights and gradients then stay finite if all scores underflow to 0.
        log_scores_GSE = jax.nn.log_sigmoid(logits_GSE)
        biased_GSE = jax.lax.stop_gradient(jnp.exp(log_scores_GSE) + state["bias"])
        allowed_GSE = self.limit_groups(biased_GSE)
        log_top_GSK, ids_GSK = top_choices(log_scores_GSE, self.top_k, allowed_GSE)
        normalise = jax.nn.softmax if self.renormalize else jnp.exp
        weights_GSK = self.routed_scale * normalise(log_top_GSK)
        choice = TokenChoice(ids_GSK, weights_GSK, jnp.ones(ids_GSK.shape, bool))
        # Normalise the sigmoids to sum to 1; otherwise the balance loss would not be 1 when
        # balanced.
        probs_GSE = jax.nn.softmax(log_scores_GSE, axis=-1)
        return choice, self.aux(inputs, logits_GSE, probs_GSE, ids_GSK)

    def limit_groups(self, biased_GSE: Float[Array, "G S E"]) -> Float[Array, "G S E"]:
        """Exclude the experts outside each token's best `top_groups` groups.

        Args:
          biased_GSE: scores with the bias.

        Returns:
          The same scores, -inf for excluded experts.
        """
        n = self.expert_groups
        if self.top_groups == n:
            return biased_GSE
        G, S, E = biased_GSE.shape
        best_two = jnp.sort(biased_GSE.reshape(G, S, n, E // n), axis=-1)[..., -2:]
        _, stay = top_choices(best_two.sum(-1), self.top_groups)
        stays = (stay[..., None] == jnp.arange(n)).any(-2)
        return jnp.where(jnp.repeat(stays, E // n, axis=-1), biased_GSE, -jnp.inf)
