"""Expert choice routing (Zhou et al., arXiv 2202.09368): experts choose tokens.

Axes: G routing groups, S tokens per group, E experts, C slots per expert per group.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.moe.balance import balanced_by_construction, router_aux
from moe_jax.moe.routers.linear import LinearRouter
from moe_jax.moe.types import ExpertChoice, RouterIn


@dataclasses.dataclass(frozen=True)
class ExpertChoiceRouter(LinearRouter):
    """Each expert takes the C = ceil(S * top_k / E) tokens of a group that give it most weight.

    Weights are the softmax over experts.  Ties go to the lower token; an expert takes padding only
    if no real token is left.  All experts therefore take equally many real tokens of a group, and
    the balance loss is 1 without a gradient.

    A token's experts depend on later tokens, so a next-token model must not use this router.

    Reference: Zhou et al., arXiv 2202.09368.
    """

    top_k: int = 2  # experts per token, on average

    @property
    def choices_per_token(self) -> int:
        """K, experts per token, on average."""
        return self.top_k

    @property
    def balanced_by_loss(self) -> bool:
        """False: every expert takes equally many tokens."""
        return False

    @property
    def causal(self) -> bool:
        """False: the tokens of an expert depend on all tokens of the group."""
        return False

    def route(self, inputs: RouterIn, params, state):
        """Let each expert choose its tokens; see `types.Router`."""
        logits_GSE = self.logits(inputs, params["kernel"])
        probs_GSE = jax.nn.softmax(logits_GSE, axis=-1)
        S, E = probs_GSE.shape[1:]
        C = min(S, -(-S * self.top_k // E))
        probs_GES = probs_GSE.swapaxes(1, 2)
        wanted_GES = jnp.where(inputs.mask_GS[:, None], jax.lax.stop_gradient(probs_GES), -1)
        # XLA can partition a sort over G, but not `jax.lax.top_k`.
        ids_GEC = jnp.argsort(wanted_GES, axis=-1, stable=True, descending=True)[..., :C]
        ids_GEC = ids_GEC.astype(jnp.int32)
        weights_GEC = jnp.take_along_axis(probs_GES, ids_GEC, axis=-1)
        balance = balanced_by_construction(inputs.mask_GS, probs_GSE.dtype)
        aux = router_aux(logits_GSE, probs_GSE, balance, inputs.mask_GS)
        return ExpertChoice(ids_GEC, weights_GEC), aux
