"""Held-out loss, with the eval capacity factor and without dropping, overall and per source.

B rows, T positions, D model width, S sources.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from moe_jax.data.batch import Batch
from moe_jax.model.define import ModelDef, Params, define
from moe_jax.model.forward import batch_context, forward, head_weight
from moe_jax.moe.noise import row_keys
from moe_jax.moe.types import MoEAux, MoEContext
from moe_jax.ops.cross_entropy import token_nll


@dataclasses.dataclass(frozen=True)
class EvalSums:
    """Sums over held-out tokens; those of several batches can be added."""

    nll_S: Float[Array, "S"]  # nats, eval capacity factor
    nodrop_nll_S: Float[Array, "S"]  # nats, no token dropped
    targets_S: Int[Array, "S"]
    bytes_S: Int[Array, "S"]
    moe: MoEAux | None


jax.tree_util.register_dataclass(EvalSums)


def never_dropping(model: ModelDef) -> ModelDef:
    """The model with a dispatch path that drops nothing; it takes the same parameters."""
    parts = model.components
    if parts is None or not parts.dispatch.drops:
        return model
    return define(model.config, model.dtype, parts.without_drops())


def make_eval_step(
    model: ModelDef, num_sources: int, mesh: Mesh
) -> Callable[[Params, Mapping[str, jax.Array], Batch], EvalSums]:
    """Make the function (params, router state, batch [1, B, T]) -> EvalSums; call it under jit."""
    nodrop = never_dropping(model)

    def nll(model: ModelDef, params: Params, batch: Batch, context: MoEContext):
        x_BTD, moe = forward(
            model, params, batch.tokens_BT, batch.positions_BT, batch.segments_BT, context
        )
        chunk = model.config.loss_chunk
        head_DV = head_weight(model, params)
        return token_nll(x_BTD, head_DV, batch.targets_BT, chunk=chunk, mesh=mesh), moe

    def eval_step(params: Params, router: Mapping[str, jax.Array], batch: Batch) -> EvalSums:
        """Compute the sums of one held-out batch."""
        batch = jax.tree.map(lambda x: x[0], batch)
        keys_B = row_keys(jax.random.key(0), batch.row_B)
        context = batch_context(batch, keys_B, mesh, False, router, num_sources)
        nll_BT, moe = nll(model, params, batch, context)
        nodrop_BT = nll_BT if nodrop is model else nll(nodrop, params, batch, context)[0]

        def by_source(values_BT):
            values = jnp.where(batch.loss_mask_BT, values_BT, 0)
            one_hot = batch.sources_BT[..., None] == jnp.arange(num_sources)
            return jnp.where(one_hot, values[..., None], 0).sum((0, 1))

        ones_BT = jnp.ones_like(batch.bytes_BT)
        return EvalSums(
            by_source(nll_BT),
            by_source(nodrop_BT),
            by_source(ones_BT),
            by_source(batch.bytes_BT),
            moe,
        )

    return eval_step


def eval_row(sums: EvalSums, sources: tuple[str, ...], rows: int) -> dict[str, Any]:
    """Make the metrics row of one evaluation.

    Args:
      sums: NumPy arrays, summed over all held-out batches.
      sources: names of the sources, in the order of axis S.
      rows: held-out rows evaluated, padding rows not counted.
    """
    targets, size = max(1, sums.targets_S.sum()), max(1, sums.bytes_S.sum())
    present = [s for s in range(len(sources)) if sums.targets_S[s]]
    row: dict[str, Any] = {
        "eval_loss": float(sums.nll_S.sum() / targets),
        "eval_loss_nodrop": float(sums.nodrop_nll_S.sum() / targets),
        "eval_bits_per_byte": float(sums.nll_S.sum() / size / np.log(2)),
        "eval_bits_per_byte_nodrop": float(sums.nodrop_nll_S.sum() / size / np.log(2)),
        "eval_rows": rows,
        "eval_tokens": int(targets),
    }
    if sums.moe is not None:
        outcomes = sums.moe.stats.outcomes
        sampled = outcomes.sampled().sum()
        row["eval_drop_fraction"] = float((sampled - outcomes.kept.sum()) / max(1, sampled))
    row["eval_loss_by_source"] = {
        sources[s]: float(sums.nll_S[s] / sums.targets_S[s]) for s in present
    }
    return row
