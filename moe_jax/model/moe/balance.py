"""Auxiliary losses of a router: balance, z-loss, entropy.  Real tokens only, as (sum, count)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.model.moe.types import Mean, RouterAux


def balance_loss(
    probs_GSE: Float[Array, "G S E"],
    ids_GSK: Int[Array, "G S K"],
    mask_GS: Bool[Array, "G S"],
    *,
    scope: str,
    rows: int,
) -> Mean:
    """E * sum_e f_e * P_e (Switch, arXiv 2101.03961): 1 when balanced, for any K.

    f_e is the share of the choices in `ids_GSK` that went to expert e, P_e the mean probability;
    both over real tokens of one routing group (`group`), one row (`row`) or the whole microbatch
    over the whole mesh (`global`).  Groups and rows are averaged by their real tokens, which is
    what makes the loss additive over microbatches.
    """
    G, S, E = probs_GSE.shape
    parts = {"group": (G, S), "row": (G * rows, S // rows), "global": (1, G * S)}[scope]
    mask = mask_GS.reshape(parts).astype(probs_GSE.dtype)
    probs = probs_GSE.reshape(*parts, E)
    ids = ids_GSK.reshape(*parts, -1)
    counts = jax.vmap(lambda i, m: _counts(i, m, E))(ids, mask)
    tokens = mask.sum(1)
    safe = jnp.maximum(tokens, 1)[:, None]
    f = counts / (safe * ids.shape[-1])
    P = jnp.einsum("pse,ps->pe", probs, mask, precision="highest") / safe
    return Mean((E * (f * P).sum(1) * tokens).sum(), tokens.sum())


def _counts(ids_SK, mask_S, num_experts: int):
    """How often each expert stands in ids_SK, weighted by mask_S; no gradient by construction."""
    weights = jnp.broadcast_to(mask_S[:, None], ids_SK.shape)
    return jnp.zeros(num_experts, mask_S.dtype).at[ids_SK.reshape(-1)].add(weights.reshape(-1))


def router_aux(
    logits_GSE: Float[Array, "G S E"],
    probs_GSE: Float[Array, "G S E"],
    balance: Mean,
    mask_GS: Bool[Array, "G S"],
) -> RouterAux:
    """Balance as given, with z-loss (of the logits) and entropy (of the probabilities) beside it.

    The loss is masked, not the logits: a padding token whose logits are zeroed would still cost
    log(E)^2.
    """
    mask = mask_GS.astype(probs_GSE.dtype)
    z_GS = jax.nn.logsumexp(logits_GSE, axis=-1) ** 2
    entropy_GS = -(probs_GSE * jnp.log(jnp.maximum(probs_GSE, 1e-30))).sum(-1)
    count = mask.sum()
    return RouterAux(
        balance=balance,
        z=Mean((z_GS * mask).sum(), count),
        entropy=Mean((jax.lax.stop_gradient(entropy_GS) * mask).sum(), count),
    )
