"""Auxiliary losses of a router: balance, z-loss, entropy.  Real tokens only, as (sum, count).

Axes: G routing groups, S tokens per group, E experts, K assignments per token, P parts inside
which the load is balanced.  Real tokens are those that are not padding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.errors import UserError
from moe_jax.moe.config import MoEConfig
from moe_jax.moe.types import Mean, MoEAux, RouterAux


def balance_loss(
    probs_GSE: Float[Array, "G S E"],
    ids_GSK: Int[Array, "G S K"],
    mask_GS: Bool[Array, "G S"],
    *,
    scope: str,
    rows: int,
) -> Mean:
    """The balance loss E * sum_e f_e * P_e (Switch, arXiv 2101.03961): 1 when balanced, for any K.

    f_e is the share of the assignments in `ids_GSK` that chose expert e, P_e its mean probability,
    both over the real tokens of one routing group (`group`), one row (`row`) or the whole
    microbatch on all devices (`global`).  Groups and rows are averaged with their numbers of real
    tokens as weights, so the loss is additive over microbatches.
    """
    E, K = probs_GSE.shape[-1], ids_GSK.shape[-1]
    probs, ids, mask = by_part(scope, rows, probs_GSE, ids_GSK, mask_GS.astype(probs_GSE.dtype))
    counts = jax.vmap(lambda i, m: _counts(i, m, E))(ids, mask)
    tokens = mask.sum(1)
    safe = jnp.maximum(tokens, 1)[:, None]
    f = counts / (safe * K)
    P = jnp.einsum("pse,ps->pe", probs, mask, precision="highest") / safe
    return token_mean(E * (f * P).sum(1), tokens)


def variation_loss(
    importance_GSE: Float[Array, "G S E"],
    load_GSE: Float[Array, "G S E"],
    mask_GS: Bool[Array, "G S"],
    *,
    scope: str,
    rows: int,
) -> Mean:
    """The loss 1 + CV(importance)^2 + CV(load)^2 (Shazeer et al., arXiv 1701.06538).

    It is 1 when balanced.  Importance and load are summed per expert over the real tokens of a
    part; CV is their standard deviation over experts, divided by their mean.  The parts, and the
    average over them, are those of `balance_loss`.
    """
    mask_GS = mask_GS.astype(importance_GSE.dtype)
    importance, load, mask = by_part(scope, rows, importance_GSE, load_GSE, mask_GS)
    value = 1 + _variation(importance, mask) + _variation(load, mask)
    return token_mean(value, mask.sum(1))


def balanced_by_construction(mask_GS: Bool[Array, "G S"], dtype) -> Mean:
    """The balance loss of a router that always gives all experts equally many tokens: 1.

    With f_e = 1 / E, E * sum_e f_e * P_e is the sum of the mean probabilities: 1, without gradient.
    """
    tokens = mask_GS.sum(dtype=dtype)
    return Mean(tokens, tokens)


def by_part(scope: str, rows: int, *arrays_GS: jax.Array) -> list[jax.Array]:
    """Reshape [G, S, ...] to [parts, tokens per part, ...]; `scope` says what a part is."""
    G, S = arrays_GS[0].shape[:2]
    parts = {"group": (G, S), "row": (G * rows, S // rows), "global": (1, G * S)}[scope]
    return [a.reshape(*parts, *a.shape[2:]) for a in arrays_GS]


def token_mean(value_P: Float[Array, "P"], tokens_P: Float[Array, "P"]) -> Mean:
    """The mean over parts, weighted by their numbers of real tokens."""
    return Mean((value_P * tokens_P).sum(), tokens_P.sum())


def _counts(ids_SK, mask_S, num_experts: int):
    """Assignments per expert in ids_SK, weighted by mask_S; they have no gradient."""
    weights = jnp.broadcast_to(mask_S[:, None], ids_SK.shape)
    return jnp.zeros(num_experts, mask_S.dtype).at[ids_SK.reshape(-1)].add(weights.reshape(-1))


def _variation(values_PSE, mask_PS):
    """Squared coefficient of variation over experts of the masked sums over tokens: [P]."""
    sums_PE = jnp.einsum("pse,ps->pe", values_PSE, mask_PS, precision="highest")
    E = sums_PE.shape[1]
    share_PE = sums_PE / jnp.maximum(sums_PE.sum(1, keepdims=True), 1e-9)
    return E * ((share_PE - 1 / E) ** 2).sum(1)


def router_aux(
    logits_GSE: Float[Array, "G S E"],
    probs_GSE: Float[Array, "G S E"],
    balance: Mean,
    mask_GS: Bool[Array, "G S"],
) -> RouterAux:
    """Add the z-loss (of the logits) and the entropy (of the probabilities) to a balance loss.

    The mask is applied to the losses, not to the logits: a padding token with zeroed logits would
    still add log(E)^2.
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


def probability_sums(probs_GSE: Float[Array, "G S E"], mask_GS: Bool[Array, "G S"]) -> Mean:
    """The sum of each expert's probability over real tokens [E], and their number [1]."""
    mask = mask_GS.astype(probs_GSE.dtype)
    sums_E = jnp.einsum("gse,gs->e", probs_GSE, mask, precision="highest")
    return Mean(sums_E, mask.sum()[None])


class AuxMeans(NamedTuple):
    """Auxiliary losses, unweighted: means over real tokens, of all MoE layers."""

    balance: Float[Array, ""]  # 1 when balanced; the number of layers if `balance_layers` is sum
    z: Float[Array, ""]  # mean over layers


def aux_means(
    aux: MoEAux, tokens: Float[Array, ""] | None = None, layers: str = "mean"
) -> AuxMeans:
    """The auxiliary losses of one layer or of several, stacked.

    Args:
      aux: of one layer, or of layers with a leading axis.
      tokens: the divisor of the sums if `aux` is one part of a batch; None: the tokens that `aux`
        counts.
      layers: `balance_layers` of the config.  By default the balance loss is computed per layer
        and averaged, because opposite imbalances of two layers cancel if they are pooled.

    Raises:
      UserError: `layers` is pooled and the router reports no probabilities.
    """

    def per_layer(total: Mean) -> jax.Array:
        return total.sum / (jnp.maximum(total.count, 1) if tokens is None else tokens)

    z = per_layer(aux.router.z).mean()
    if layers == "pooled":
        return AuxMeans(_pooled_balance(aux, tokens), z)
    balance = per_layer(aux.router.balance)
    return AuxMeans(balance.sum() if layers == "sum" else balance.mean(), z)


def _pooled_balance(aux: MoEAux, tokens: Float[Array, ""] | None) -> jax.Array:
    """E * sum_e f_e P_e, with the load f and the probabilities P averaged over layers."""
    probs = aux.router.probs
    if probs is None:
        raise UserError(
            "model.moe.balance_layers is pooled, but this router reports no probabilities: "
            "set it to mean or sum."
        )
    load_LE = jnp.atleast_2d(aux.load_E).astype(probs.sum.dtype)
    f_E = (load_LE / jnp.maximum(load_LE.sum(1, keepdims=True), 1)).mean(0)
    P_E = (jnp.atleast_2d(probs.sum) / jnp.maximum(jnp.atleast_2d(probs.count), 1)).mean(0)
    value = f_E.size * (f_E * P_E).sum()
    # Microbatches are weighted by their real tokens, which every layer counts.
    share = 1.0 if tokens is None else probs.count.reshape(-1)[0] / tokens
    return value * share


def add_aux_loss(loss: jax.Array | float, means: AuxMeans, config: MoEConfig) -> jax.Array:
    """Add the auxiliary losses to `loss`, with the weights of `config`."""
    return loss + config.balance_weight * means.balance + config.z_weight * means.z


def aux_loss(aux: MoEAux, config: MoEConfig) -> Float[Array, ""]:
    """The weighted balance loss and router z-loss of MoE layers, to add to a model's loss.

    Args:
      aux: the MoEAux of one layer, or of several layers, stacked.
      config: gives `balance_weight` and `z_weight`.

    Returns:
      balance_weight * balance + z_weight * z, each a mean over real tokens; over layers, z is the
      mean, and balance what `balance_layers` says.

    Raises:
      UserError: `balance_layers` is pooled and the router reports no probabilities.

    Reference: Switch, arXiv 2101.03961, equation 4; ST-MoE, arXiv 2202.08906, equation 5.
    """
    return add_aux_loss(0.0, aux_means(aux, layers=config.balance_layers), config)
