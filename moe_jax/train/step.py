"""The train step: computes gradients of a global batch and updates the train state.

A microbatches (`train.accumulation`), B rows per microbatch, T positions.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from moe_jax.data.batch import Batch
from moe_jax.model.define import ModelDef, Params
from moe_jax.model.forward import batch_context
from moe_jax.moe.noise import row_keys
from moe_jax.moe.types import DispatchStats, Ledger, MoEAux
from moe_jax.parallel.rules import sharding
from moe_jax.train.copies import make_copies, with_copies
from moe_jax.train.guard import Guard, judge, next_guard
from moe_jax.train.losses import Counts, LossSums, LossValues, count, loss_sums, loss_values
from moe_jax.train.optim import Optimizer
from moe_jax.train.state import TrainState, replicated, state_shardings

RouterState: TypeAlias = Mapping[str, jax.Array]  # name -> [MoE layers, ...]


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """The metrics of one step; they stay on the device until they are read."""

    loss: LossValues  # means over the batch: the total and its parts
    grad_norm: Float[Array, ""]  # global, before clipping
    learning_rate: Float[Array, ""]  # of this step
    tokens: Float[Array, ""]  # padding tokens not counted
    skipped: Bool[Array, ""]  # only step counter and guard have changed
    spike: Bool[Array, ""]  # skipped although finite: far above the running means
    guard: Guard  # after the step; a skipped step leaves the running means unchanged
    moe: MoEAux | None  # summed over microbatches, one entry per MoE layer; None: dense model


jax.tree_util.register_dataclass(StepMetrics)


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """Options of the train step, in addition to the model and the optimizer."""

    seed: int = 0  # of router noise and dropout; 0 or more
    clip_norm: float = 1.0  # global norm of the gradient; 0: no clipping
    # Skip a step whose loss or gradient norm is more than this many times its running mean; 0:
    # never skip finite steps.
    spike_factor: float = 100.0
    num_sources: int = 1  # sources of the data, for the ledger
    debug: bool = False  # assert in each step that every assignment is counted once


def step_keys(seed: int, step: Int[Array, ""], row_B: Int[Array, "B"]) -> jax.Array:
    """Make one threefry key per row: fold(seed, step, global row id).

    The key does not depend on mesh axes or the microbatch, and is never an rbg key, so a row has
    the same noise wherever it is computed.

    Args:
      seed: of the run.
      step: counted from 0.
      row_B: global row ids.

    Returns:
      Keys [B].
    """
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    return row_keys(key, row_B)


def make_gradients(
    model: ModelDef, options: StepOptions, mesh: Mesh
) -> Callable[[Params, RouterState, Batch, jax.Array], tuple[Params, LossSums, Counts]]:
    """Make the function that computes the gradients of a global batch.

    The A microbatches run one after the other, and their gradients are added.

    Args:
      model: from `define`.
      options: of the train step.
      mesh: from `make_mesh`.

    Returns:
      (params, router state, batch [A, B, T], step) -> gradients, loss sums and their counts;
      `params` may be compute-dtype copies.
    """

    def microbatch(
        params: Params, router: RouterState, batch: Batch, step: jax.Array, counts: Counts
    ) -> tuple[jax.Array, LossSums]:
        keys_B = step_keys(options.seed, step, batch.row_B)
        context = batch_context(batch, keys_B, mesh, True, router, options.num_sources)
        sums = loss_sums(model, params, batch, context, mesh)
        return loss_values(sums, counts, model).total, sums

    def gradients(
        params: Params, router: RouterState, batch: Batch, step: jax.Array
    ) -> tuple[Params, LossSums, Counts]:
        counts = count(batch, model.abstract["embed_VD"].dtype)

        def one(batch):
            grads, sums = jax.grad(microbatch, has_aux=True)(params, router, batch, step, counts)
            # Gradients of copies have the compute dtype; add and use them in the weights' dtype.
            return jax.tree.map(lambda g, own: g.astype(own.dtype), grads, model.abstract), sums

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
    """Make the train step as a pure function; `jit_train_step` makes the one that a run compiles.

    Args:
      model: from `define`.
      optimizer: the one that made the optimizer state.
      options: seed of the noise, clipping and step guard.
      mesh: from `make_mesh`; holds state and batch.

    Returns:
      (state, batch [A, B, T]) -> (state, metrics).

    Raises:
      UserError: raised by the returned function if routing groups or mesh do not divide the rows
        of a microbatch.
    """
    gradients = make_gradients(model, options, mesh)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """Run one optimizer step on the global batch."""
        state, used = _without_copies(state)
        grads, sums, counts = gradients(used, state.router, batch, state.step)
        with jax.named_scope("optimizer"):
            loss, norm = loss_values(sums, counts, model), optax.tree.norm(grads)
            if options.clip_norm:
                scale = jnp.minimum(1.0, options.clip_norm / jnp.maximum(norm, 1e-12))
                grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
            params, moments = optimizer.update(
                grads, state.optimizer, state.params, model.rules, state.step, state.fall
            )
            router = _next_router_state(model, state.router, sums.moe)
            new = TrainState(state.step, params, moments, router, state.guard, state.fall)
            decision = judge(state.guard, loss.total, norm, options.spike_factor)
            accepted = decision.accepted
            new = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), new, state)
            guard = next_guard(state.guard, decision, loss.total, norm, state.step + 1)
            copies = make_copies(model, new.params)
        if options.debug and sums.moe is not None:
            jax.debug.callback(_assert_conserved, sums.moe.stats, sums.moe.ledger)
        metrics = StepMetrics(
            loss=loss,
            grad_norm=norm,
            learning_rate=jnp.asarray(optimizer.schedule(state.step, state.fall)),
            tokens=counts.tokens,
            skipped=~decision.accepted,
            spike=decision.spike,
            guard=guard,
            moe=sums.moe,
        )
        new = dataclasses.replace(new, step=state.step + 1, guard=guard, copies=copies)
        return new, metrics

    return train_step


def _without_copies(state: TrainState) -> tuple[TrainState, Params]:
    """Split a state into one without copies and the parameters that the model reads."""
    used = with_copies(state.params, state.copies)
    return dataclasses.replace(state, copies={}), used


def _next_router_state(model: ModelDef, state: RouterState, moe: MoEAux | None) -> RouterState:
    """Update the router state from the load of the global batch."""
    if moe is None or model.components is None or model.config.moe.freeze_router:
        return state
    return model.components.router.next_state(state, moe.load_E)


def _assert_conserved(stats: DispatchStats, ledger: Ledger) -> None:
    """Raise AssertionError, which ends the run, if an assignment is lost or counted twice."""
    for name, outcomes in {"total": stats.outcomes, **ledger._asdict()}.items():
        found = np.asarray(outcomes.total()).reshape(len(stats.assignments), -1).sum(1)
        assert (found == stats.assignments).all(), (
            f"assignments by {name} are not conserved: {found} of {stats.assignments} per layer"
        )


def jit_train_step(
    model: ModelDef, optimizer: Optimizer, options: StepOptions, mesh: Mesh
) -> jax.stages.Wrapped:
    """Make the jitted train step that a run compiles; its state is donated.

    Args:
      model: from `define`.
      optimizer: the one that made the optimizer state.
      options: seed of the noise, clipping and step guard.
      mesh: from `make_mesh`; holds state and batch.

    Returns:
      (state, batch of `put_batch`) -> (state, metrics).  A step whose loss or gradient is not
      finite, or far above its running mean, changes only the step counter and the guard.

    Raises:
      UserError: as `make_train_step`, when a batch of a new shape is compiled.
    """
    step = make_train_step(model, optimizer, options, mesh)
    where = state_shardings(model, optimizer, mesh)
    # Metrics are replicated so that each process can read them.
    return jax.jit(step, donate_argnums=0, out_shardings=(where, replicated(mesh)))


def abstract_batch(microbatch: tuple[int, int, int], mesh: Mesh) -> Batch:
    """The abstract batch of one step, as a feed delivers it; `microbatch` is (A, B, T)."""
    shape, rows = microbatch, microbatch[:2]
    tokens = sharding(mesh, (None, "batch", None))
    whole = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=tokens)
    mask = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=tokens)
    row = jax.ShapeDtypeStruct(rows, jnp.int32, sharding=sharding(mesh, (None, "batch")))
    return Batch(
        tokens_BT=whole,
        targets_BT=whole,
        segments_BT=whole,
        positions_BT=whole,
        loss_mask_BT=mask,
        sources_BT=whole,
        bytes_BT=whole,
        row_B=row,
    )
