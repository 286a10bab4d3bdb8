"""The train step: one global batch in, one new state out."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from moe_jax.config import Config
from moe_jax.data.pipeline import Batch
from moe_jax.losses import Counts, LossSums, LossValues, count, loss_sums, loss_values
from moe_jax.model.moe.types import MoEAux, MoEContext
from moe_jax.model.stack import ModelDef
from moe_jax.optim import Optimizer
from moe_jax.train.state import TrainState, everywhere, state_shardings


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """What one step reports, on the device until somebody reads it."""

    loss: LossValues
    grad_norm: Float[Array, ""]  # before clipping
    learning_rate: Float[Array, ""]
    tokens: Float[Array, ""]  # real tokens
    moe: MoEAux | None  # summed over microbatches, one entry a MoE layer


jax.tree_util.register_dataclass(StepMetrics)


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What the step needs beside the model and the optimizer."""

    seed: int
    group_rows: int
    clip_norm: float  # 0: no clipping

    @classmethod
    def of(cls, config: Config) -> "StepOptions":
        """What the train step takes from a resolved config."""
        return cls(config.seed, config.model.moe.group_rows, config.optimizer.clip_norm)


def row_keys(seed: int, step: Int[Array, ""], row_B: Int[Array, "B"]) -> jax.Array:
    """One threefry key a row: fold(seed, step, global row id).

    No axis index, microbatch index or rbg key: noise belongs to the row, wherever it is computed.
    """
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(row_B)


def make_gradients(
    model: ModelDef, options: StepOptions, mesh: Mesh
) -> Callable[[Any, Batch, jax.Array], tuple[Any, LossSums, Counts]]:
    """(params, batch [A, B, T], step) -> gradients of the loss, its sums, what divides them.

    The A microbatches are taken one after the other and their gradients added.
    """

    def microbatch(params: Any, batch: Batch, step: jax.Array, counts: Counts):
        context = MoEContext(
            token_ids_BT=batch.tokens_BT,
            mask_BT=batch.segments_BT > 0,
            row_keys_B=row_keys(options.seed, step, batch.row_B),
            mesh=mesh,
            group_rows=options.group_rows,
            train=True,
        )
        sums = loss_sums(model, params, batch, context, mesh)
        return loss_values(sums, counts, model).total, sums

    def gradients(params: Any, batch: Batch, step: jax.Array):
        counts = count(batch, model.abstract["embed_VD"].dtype)

        def one(batch):
            return jax.grad(microbatch, has_aux=True)(params, batch, step, counts)

        first = jax.tree.map(lambda x: x[0], batch)
        if batch.row_B.shape[0] == 1:
            return *one(first), counts

        def add(total, batch):
            return jax.tree.map(jnp.add, total, one(batch)), None

        shapes = jax.eval_shape(one, first)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return *jax.lax.scan(add, zeros, batch)[0], counts

    return gradients


def make_train_step(
    model: ModelDef, optimizer: Optimizer, options: StepOptions, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """The step with everything bound that does not change; `jit_train_step` donates the state."""
    gradients = make_gradients(model, options, mesh)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """One optimizer step on the global batch."""
        grads, sums, counts = gradients(state.params, batch, state.step)
        norm = optax.tree.norm(grads)
        if options.clip_norm:
            scale = jnp.minimum(1.0, options.clip_norm / jnp.maximum(norm, 1e-12))
            grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        params, moments = optimizer.update(grads, state.optimizer, state.params, state.step)
        metrics = StepMetrics(
            loss=loss_values(sums, counts, model),
            grad_norm=norm,
            learning_rate=jnp.asarray(optimizer.schedule(state.step)),
            tokens=counts.tokens,
            moe=sums.moe,
        )
        return TrainState(state.step + 1, params, moments), metrics

    return train_step


def jit_train_step(
    model: ModelDef, optimizer: Optimizer, options: StepOptions, mesh: Mesh
) -> jax.stages.Wrapped:
    """The train step as a run compiles it."""
    step = make_train_step(model, optimizer, options, mesh)
    where = state_shardings(model, optimizer, mesh)
    # Metrics whole on every device: each process can read them.
    return jax.jit(step, donate_argnums=0, out_shardings=(where, everywhere(mesh)))
