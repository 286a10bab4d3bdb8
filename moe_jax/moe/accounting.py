"""Counts the outcome of every assignment, for all routers and dispatch paths.

Axes: G routing groups, S tokens per group, K assignments per token, E experts, B rows, T positions
per row, P position buckets, N data sources.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moe_jax.moe.types import (
    BranchScale,
    Choice,
    DispatchStats,
    ExpertChoice,
    Ledger,
    MoEContext,
    Outcomes,
    TokenChoice,
)

SCALE_STRIDE = 16  # one position in 16 is read for the scale of the branch
POSITION_BUCKETS = 8  # equal parts of a row: drops of late tokens show in the last ones


def count_outcomes(
    choice: Choice,
    by_token: TokenChoice,
    kept_GSK: Bool[Array, "G S K"],
    drop_cause: str,
    num_experts: int,
    context: MoEContext,
) -> tuple[DispatchStats, Ledger]:
    """Count the outcomes of one layer's assignments, in total and by axis.

    Args:
      choice: as the router made it.
      by_token: the same choice, by token.
      kept_GSK: True for assignments that their expert computed.
      drop_cause: the field of Outcomes that counts sampled assignments of real tokens not kept.
      num_experts: E.
      context: mask, group rows and sources of the microbatch.
    """
    G, S, K = kept_GSK.shape
    rows = context.mask_BT.shape[0]
    outcomes = _outcomes(choice, by_token, context.mask_BT.reshape(G, S), kept_GSK, drop_cause)
    mine_GSK = by_token.ids_GSK
    expert = Outcomes(*(_by_expert(mine_GSK, outcome, num_experts) for outcome in outcomes))
    per_token = [outcome.reshape(rows, -1, K).sum(-1, dtype=jnp.int32) for outcome in outcomes]
    ledger = Ledger(
        expert=expert,
        position=Outcomes(*map(_by_position, per_token)),
        source=Outcomes(*(_by_source(n_BT, context) for n_BT in per_token)),
    )
    made = choice.ids_GEC if isinstance(choice, ExpertChoice) else choice.ids_GSK
    stats = DispatchStats(
        assignments=jnp.asarray(made.size, jnp.int32),
        outcomes=Outcomes(*(n_BT.sum() for n_BT in per_token)),
        lost_tokens=(context.mask_BT.reshape(G, S) & ~kept_GSK.any(-1)).sum(dtype=jnp.int32),
        kept_weight_sum=jnp.where(kept_GSK, jax.lax.stop_gradient(by_token.weights_GSK), 0).sum(),
    )
    return stats, ledger


def branch_scale(
    out_BTD: Float[Array, "B T D"], residual_BTD: Float[Array, "B T D"], mask_BT: Bool[Array, "B T"]
) -> BranchScale:
    """Sum the squares of a layer's output and of the residual stream, over sampled real tokens.

    Args:
      out_BTD: output of the MoE layer.
      residual_BTD: the stream that it is added to.
      mask_BT: True for real tokens.
    """

    def squares(x_BTD):
        # A sample, because all positions would be read once more: by bytes about 1% of a layer's
        # time (estimated for bench_olmoe_half on an H200).
        x_BTD = jax.lax.stop_gradient(x_BTD[:, ::SCALE_STRIDE])
        x_BTD = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
        return jnp.where(mask_BT[:, ::SCALE_STRIDE, None], x_BTD**2, 0).sum()

    return BranchScale(squares(out_BTD), squares(residual_BTD))


def _outcomes(choice, by_token, mask_GS, kept_GSK, drop_cause: str) -> Outcomes:
    """One mask [G, S, K] per outcome."""
    real_GSK = jnp.broadcast_to(mask_GS[..., None], kept_GSK.shape)
    made_GSK = jnp.ones_like(kept_GSK)
    if isinstance(choice, ExpertChoice):  # pairs that the expert did not take are no assignments
        made_GSK = by_token.valid_GSK
    nothing = jnp.zeros_like(kept_GSK)
    outcomes = Outcomes(
        kept=kept_GSK,
        dropped_capacity=nothing,
        dropped_buffer=nothing,
        unsampled=made_GSK & real_GSK & ~by_token.valid_GSK,
        padding=made_GSK & ~real_GSK,
    )
    return outcomes._replace(**{drop_cause: real_GSK & by_token.valid_GSK & ~kept_GSK})


def _by_expert(
    ids_GSK: Int[Array, "G S K"], outcome_GSK: Bool[Array, "G S K"], num_experts: int
) -> Int[Array, "E"]:
    """Count by comparing and summing, which XLA fuses; accelerators run a scatter-add slowly."""
    hit_GSKE = (ids_GSK[..., None] == jnp.arange(num_experts)) & outcome_GSK[..., None]
    return hit_GSKE.sum((0, 1, 2), dtype=jnp.int32)


def _by_position(n_BT: Int[Array, "B T"]) -> Int[Array, "P"]:
    T = n_BT.shape[1]
    bucket_T = np.arange(T) * POSITION_BUCKETS // T
    in_bucket_TP = bucket_T[:, None] == np.arange(POSITION_BUCKETS)
    return (n_BT.sum(0)[:, None] * in_bucket_TP).sum(0, dtype=jnp.int32)


def _by_source(n_BT: Int[Array, "B T"], context: MoEContext) -> Int[Array, "N"]:
    if context.sources_BT is None:
        return jnp.zeros(context.num_sources, jnp.int32).at[0].set(n_BT.sum(dtype=jnp.int32))
    mine_BTN = context.sources_BT[..., None] == jnp.arange(context.num_sources)
    return jnp.where(mine_BTN, n_BT[..., None], 0).sum((0, 1), dtype=jnp.int32)
