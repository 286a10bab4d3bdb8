"""Noisy top-k gating (Shazeer et al., arXiv 1701.06538).

Axes: G routing groups, S tokens per group, D width, E experts, K assignments per token.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from moe_jax.errors import UserError
from moe_jax.moe.balance import router_aux, variation_loss
from moe_jax.moe.noise import NOISY_LOGITS, row_normal
from moe_jax.moe.routers.linear import LinearRouter, linear_logits, top_choices
from moe_jax.moe.types import ParamSpec, RouterIn, TokenChoice
from moe_jax.nn.remat import ROUTER_LOGITS

MIN_STD = 1e-6  # the load divides by the softplus, which can be 0 in float32


@dataclasses.dataclass(frozen=True)
class NoisyTopK(LinearRouter):
    """The K largest of x Wg + N(0, 1) * softplus(x Wn), weighted by the softmax over those K.

    Noise is drawn in training only.  The balance loss is 1 + CV(importance)^2 + CV(load)^2, so
    `model.moe.balance_weight` is the paper's w for both terms (0.1 there).  Importance is an
    expert's sum of weights.  Load is its expected number of tokens: the differentiable sum, over
    tokens, of the probability that the expert would be chosen if only its noise were redrawn.
    Without noise, load is the number of tokens.  z-loss and entropy use the logits without noise.

    Raises:
      UserError: K = 1, which gives the router no gradient.

    Reference: Shazeer et al., arXiv 1701.06538, equations 3 to 11.
    """

    top_k: int = 2  # K, experts per token

    def __post_init__(self):
        super().__post_init__()
        if self.top_k == 1:
            raise UserError(
                "model.moe.top_k is 1 with router noisy_top_k: the softmax over one logit is 1 and "
                "gives the router no gradient. Set top_k to 2 or more, or router switch."
            )

    @property
    def choices_per_token(self) -> int:
        """K, experts per token."""
        return self.top_k

    @property
    def random(self) -> bool:
        """True: the logits are noisy in training."""
        return True

    def param_specs(self, width: int, num_experts: int) -> dict[str, ParamSpec]:
        """Wg and Wn, [D, E] each; initially zero, so that noise alone spreads the first tokens."""
        zero = ParamSpec((width, num_experts), ("embed", "router_experts"), 0.0)
        return {"kernel": zero, "noise_kernel": zero}

    def route(self, inputs: RouterIn, params, state):
        """Choose the K largest noisy logits; see `types.Router`."""
        logits_GSE = self.logits(inputs, params["kernel"])
        K, E = self.top_k, logits_GSE.shape[-1]
        noisy_GSE, std_GSE = logits_GSE, None
        if inputs.train:
            raw_GSE = linear_logits(inputs, params["noise_kernel"], self.jitter)
            raw_GSE = checkpoint_name(raw_GSE, ROUTER_LOGITS)
            std_GSE = jnp.maximum(jax.nn.softplus(raw_GSE), MIN_STD)
            shape = (logits_GSE.shape[1] // inputs.keys_GR.shape[1], E)
            noise_GSE = row_normal(inputs.keys_GR, NOISY_LOGITS, shape, logits_GSE.dtype)
            noisy_GSE = logits_GSE + noise_GSE * std_GSE
        # Also the (K+1)-th, if there is one: the threshold of an expert that was chosen.
        top_GSK, ids_GSK = top_choices(noisy_GSE, min(K + 1, E))
        weights_GSK, ids_GSK = jax.nn.softmax(top_GSK[..., :K], axis=-1), ids_GSK[..., :K]

        chosen_GSKE = jax.nn.one_hot(ids_GSK, E, dtype=weights_GSK.dtype)
        chosen_GSE = chosen_GSKE.sum(-2)
        load_GSE = chosen_GSE
        if std_GSE is not None and K < E:
            load_GSE = chosen_probability(logits_GSE, std_GSE, chosen_GSE > 0, top_GSK)
        balance = variation_loss(
            (chosen_GSKE * weights_GSK[..., None]).sum(-2),
            load_GSE,
            inputs.mask_GS,
            scope=self.balance_scope,
            rows=inputs.keys_GR.shape[1],
        )
        choice = TokenChoice(ids_GSK, weights_GSK, jnp.ones(ids_GSK.shape, bool))
        probs_GSE = jax.nn.softmax(logits_GSE, axis=-1)
        return choice, router_aux(logits_GSE, probs_GSE, balance, inputs.mask_GS)


def chosen_probability(
    logits_GSE: Float[Array, "G S E"],
    std_GSE: Float[Array, "G S E"],
    chosen_GSE: Bool[Array, "G S E"],
    top_GSN: Float[Array, "G S N"],
) -> Float[Array, "G S E"]:
    """The probability that each expert is chosen if only its own noise is drawn again.

    It is Phi((x Wg_i - K-th largest noisy logit of the others) / std_i), with Phi the standard
    normal distribution function.  `top_GSN` holds the N = K + 1 largest noisy logits.  For a chosen
    expert, the K-th largest of the others is the last of these; for an expert not chosen, the
    second to last.
    """
    threshold_GSE = jnp.where(chosen_GSE, top_GSN[..., -1:], top_GSN[..., -2:-1])
    return jax.scipy.special.ndtr((logits_GSE - threshold_GSE) / std_GSE)
