"""The training loss of one microbatch, as sums that are divided by counts of the global batch.

B rows, T positions, D model width.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_jax.data.batch import Batch
from moe_jax.model.define import ModelDef, Params
from moe_jax.model.forward import forward, head_weight
from moe_jax.moe.balance import AuxMeans, add_aux_loss, aux_means
from moe_jax.moe.types import MoEAux, MoEContext
from moe_jax.ops.cross_entropy import CrossEntropy, cross_entropy


class Counts(NamedTuple):
    """The divisors of the sums of a global batch; known before any forward pass."""

    targets: Float[Array, ""]  # positions in the language-model loss
    tokens: Float[Array, ""]  # padding tokens not counted


class LossSums(NamedTuple):
    """Sums over a microbatch; those of several microbatches can be added."""

    lm: CrossEntropy
    moe: MoEAux | None  # None for a dense model


@dataclasses.dataclass(frozen=True)
class LossValues:
    """Means over the global batch; `total` is minimised."""

    total: Float[Array, ""]  # lm plus the other losses, weighted by the config
    lm: Float[Array, ""]  # nats per target
    logits_z: Float[Array, ""]  # mean squared logsumexp of the logits, unweighted
    # Over MoE layers as balance_layers says, unweighted; 1 when balanced (sum: number of layers).
    balance: Float[Array, ""]
    router_z: Float[Array, ""]  # mean over MoE layers, unweighted


jax.tree_util.register_dataclass(LossValues)


def count(batch: Batch, dtype: DTypeLike) -> Counts:
    """Count targets and tokens of a batch with any leading shape."""
    return Counts(
        batch.loss_mask_BT.sum(dtype=jnp.int32).astype(dtype),
        (batch.segments_BT > 0).sum(dtype=jnp.int32).astype(dtype),
    )


def loss_sums(
    model: ModelDef, params: Params, batch: Batch, context: MoEContext, mesh: Mesh
) -> LossSums:
    """Run the forward pass and the loss of one microbatch.

    Args:
      model: from `define`.
      params: parameters, or their compute-dtype copies.
      batch: one microbatch, with axes B, T.
      context: for the MoE layers.
      mesh: from `make_mesh`.

    Returns:
      Sums over the microbatch.
    """
    x_BTD, moe = forward(
        model, params, batch.tokens_BT, batch.positions_BT, batch.segments_BT, context
    )
    with jax.named_scope("cross_entropy"):
        lm = cross_entropy(
            x_BTD,
            head_weight(model, params),
            batch.targets_BT,
            batch.loss_mask_BT,
            z_weight=model.config.logits_z_weight,
            chunk=model.config.loss_chunk,
            mesh=mesh,
            implementation=model.config.cross_entropy,
        )
    return LossSums(lm, moe)


def loss_values(sums: LossSums, counts: Counts, model: ModelDef) -> LossValues:
    """Divide the sums of a microbatch by the counts of the global batch.

    Gradients of `total` over the microbatches then add up to the gradient of the global batch.
    """
    targets, tokens = jnp.maximum(counts.targets, 1), jnp.maximum(counts.tokens, 1)
    lm = sums.lm.nll_sum / targets
    logits_z = sums.lm.z_sum / targets
    total = sums.lm.loss_sum / targets
    balance = router_z = jnp.zeros_like(lm)
    if sums.moe is not None:
        means = aux_means(sums.moe, tokens, model.config.moe.balance_layers)
        means = AuxMeans(*(mean.astype(lm.dtype) for mean in means))
        balance, router_z = means
        total = add_aux_loss(total, means, model.config.moe)
    return LossValues(total, lm, logits_z, balance, router_z)
