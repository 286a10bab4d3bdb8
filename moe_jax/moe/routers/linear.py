"""Base of the linear routers: one matrix, float32 logits, jitter and a cap on the logits.

Axes: G routing groups, S tokens per group, D width, E experts, K assignments per token.
"""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moe_jax import bounds
from moe_jax.bounds import at_least, within
from moe_jax.decides import Training
from moe_jax.moe.balance import balance_loss, probability_sums, router_aux
from moe_jax.moe.noise import JITTER, row_uniform
from moe_jax.moe.types import ParamSpec, RouterAux, RouterIn, StateSpec
from moe_jax.nn.remat import ROUTER_LOGITS
from moe_jax.ops.float32_matmul import float32_matmul


@dataclasses.dataclass(frozen=True)
class LinearRouter:
    """Knobs and defaults of a router with one [D, E] matrix, in which tokens choose experts.

    Raises:
      UserError: a jitter or a cap out of range.

    Reference: Switch, arXiv 2101.03961 (jitter); Gemma 2, arXiv 2408.00118 (cap on logits).
    """

    # E of the config that made it, for `study_router`; 0: unknown.  In a layer the matrix has E, so
    # routers that differ in this field alone compare equal.
    num_experts: int = dataclasses.field(default=0, kw_only=True, compare=False)
    balance_scope: str = "group"  # tokens over which the load is balanced: group | row | global
    balance_layers: str = "mean"  # pooled: report the mean probabilities as well
    # Standard deviation of the router's initial matrix; 0: sqrt(0.1 / width), as in Switch.
    init_std: Training[Annotated[float, at_least(0)]] = 0.02
    # j: in training the router's input is multiplied by U(1 - j, 1 + j) (Switch); 0: off.
    jitter: Training[Annotated[float, within("[0, 1)")]] = 0.0
    # c: logits become c * tanh(logits / c), smoothly bounded by c (Gemma 2); 0: off.
    logit_cap: Training[Annotated[float, at_least(0)]] = 0.0

    def __post_init__(self):
        bounds.check(self, "The router's ")

    @property
    def causal(self) -> bool:
        """True: each token's experts depend on that token alone."""
        return True

    @property
    def random(self) -> bool:
        """True if the input is jittered in training."""
        return self.jitter > 0

    @property
    def balanced_by_loss(self) -> bool:
        """True: nothing but the balance loss spreads the load over the experts."""
        return True

    def param_specs(self, width: int, num_experts: int) -> dict[str, ParamSpec]:
        """The one [D, E] matrix.

        The default std, 0.02, is that of OLMoE's and Mixtral's configurations.
        """
        std = self.init_std or math.sqrt(0.1 / width)
        return {"kernel": ParamSpec((width, num_experts), ("embed", "router_experts"), std)}

    def state_specs(self, num_experts: int) -> dict[str, StateSpec]:
        """Empty: the router keeps no state."""
        return {}

    def next_state(self, state, load_LE):
        """Return the state unchanged."""
        return dict(state)

    def logits(self, inputs: RouterIn, kernel_DE: Float[Array, "D E"]) -> Float[Array, "G S E"]:
        """The router logits, jittered in training and capped.

        Args:
          inputs: tokens and keys of one layer.
          kernel_DE: the router's matrix.

        Returns:
          [G, S, E] in float32 or wider.
        """
        logits_GSE = linear_logits(inputs, kernel_DE, self.jitter)
        if self.logit_cap:
            logits_GSE = self.logit_cap * jnp.tanh(logits_GSE / self.logit_cap)
        return checkpoint_name(logits_GSE, ROUTER_LOGITS)

    def aux(self, inputs: RouterIn, logits_GSE, probs_GSE, ids_GSK) -> RouterAux:
        """The losses and statistics of a choice.

        Args:
          inputs: for the mask and the rows per group.
          logits_GSE: for the z-loss.
          probs_GSE: probabilities of each token, which sum to 1.
          ids_GSK: the assignments that the balance loss counts.

        Returns:
          Balance loss, z-loss and entropy (nats), over real tokens.
        """
        rows = inputs.keys_GR.shape[1]
        balance = balance_loss(
            probs_GSE, ids_GSK, inputs.mask_GS, scope=self.balance_scope, rows=rows
        )
        aux = router_aux(logits_GSE, probs_GSE, balance, inputs.mask_GS)
        if self.balance_layers == "pooled":
            aux = aux._replace(probs=probability_sums(probs_GSE, inputs.mask_GS))
        return aux


def linear_logits(
    inputs: RouterIn, kernel_DE: Float[Array, "D E"], jitter: float
) -> Float[Array, "G S E"]:
    """The router logits in at least float32; in training the input is jittered by U(1-j, 1+j).

    Float32, because bfloat16 logits change the top-2 set of about 1% of tokens.
    """
    x_GSD = inputs.x_GSD
    if inputs.train and jitter > 0:
        x_GSD = x_GSD.astype(jnp.promote_types(x_GSD.dtype, jnp.float32))
        rows = inputs.keys_GR.shape[1]
        shape = (x_GSD.shape[1] // rows, x_GSD.shape[2])
        noise = row_uniform(inputs.keys_GR, JITTER, shape, x_GSD.dtype)
        x_GSD = x_GSD * (1 + jitter * (2 * noise - 1))
    return float32_matmul(x_GSD, kernel_DE)


def top_choices(
    probs_GSE: Float[Array, "G S E"],
    choices: int,
    ranked_by_GSE: Float[Array, "G S E"] | None = None,
) -> tuple[Float[Array, "G S K"], Int[Array, "G S K"]]:
    """The K largest probabilities of each token and their experts, largest first.

    With `ranked_by_GSE`, the K largest of those scores select and order the experts instead; the
    scores get no gradient.

    Ties go to the lower expert, as in `jax.lax.top_k`, which is not used because XLA does not
    partition it: on a mesh each device would gather the probabilities of all tokens and choose the
    experts of all of them.
    """
    expert_E = jnp.arange(probs_GSE.shape[-1], dtype=jnp.int32)
    left_GSE = jax.lax.stop_gradient(probs_GSE if ranked_by_GSE is None else ranked_by_GSE)
    weights, ids = [], []
    for _ in range(choices):
        is_largest_GSE = left_GSE == left_GSE.max(-1, keepdims=True)
        # In a row of NaN nothing equals the maximum; the last expert keeps its id in range.
        id_GS = jnp.where(is_largest_GSE, expert_E, expert_E[-1]).min(-1)
        chosen_GSE = expert_E == id_GS[..., None]
        weights.append(jnp.where(chosen_GSE, probs_GSE, 0).sum(-1))
        ids.append(id_GS)
        left_GSE = jnp.where(chosen_GSE, -jnp.inf, left_GSE)
    return jnp.stack(weights, -1), jnp.stack(ids, -1)
