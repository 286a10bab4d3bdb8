"""The prepared run that the checks examine; each value is computed once, when it is first read.

Properties do not change the subject, methods may.  A step donates the state that it starts from, so
the checks of the initial parameters come before those of a step (see checks.py).
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.checkpoint import named_leaves
from moe_jax.config import Config
from moe_jax.data.batch import Batch
from moe_jax.data.feed import DeviceFeed, batch_shardings
from moe_jax.model.define import ModelDef, is_axes
from moe_jax.model.layout import to_layers
from moe_jax.moe.types import MoEAux
from moe_jax.nn.params import ParamRule
from moe_jax.parallel.replicas import bit_hash
from moe_jax.run.context import Run
from moe_jax.run.loop import compile_step
from moe_jax.run.restore import restore_or_init_state
from moe_jax.tools.plan.lowering import Plan
from moe_jax.train.losses import loss_values
from moe_jax.train.state import TrainState, replicated
from moe_jax.train.step import StepMetrics, make_gradients

STEPS = 5  # steps in which the wait for data is timed


class Probe(NamedTuple):
    """One evaluation of the language-model loss alone at the initial parameters."""

    loss: float  # nats per target
    gradients: dict[str, np.ndarray]  # name -> norm, or one norm per expert
    kept: np.ndarray  # [MoE layers, E], kept assignments
    moe: MoEAux | None


class Steps(NamedTuple):
    """The effects and times of the first steps."""

    changed: dict[str, np.ndarray]  # name -> True if the first step changed it, by expert
    skipped: bool  # True: the first step was skipped
    wait: float  # mean seconds that a later step waited for data
    seconds: float  # mean seconds of a later step


@dataclasses.dataclass
class Subject:
    """The config as the user wrote it, and the run that is examined for it."""

    plan: Plan  # of the config as the user wrote it
    run: Run  # of the shrunk config, or of the same config
    shrunk: bool
    devices: Sequence[Any]
    _state: TrainState | None = dataclasses.field(default=None, init=False)
    _steps: Steps | None = dataclasses.field(default=None, init=False)

    @property
    def config(self) -> Config:
        """The config that is examined."""
        return self.run.config

    @property
    def moe_layers(self) -> list[int]:
        """The numbers of the MoE layers."""
        model = self.config.model
        return [layer for layer in range(model.num_layers) if model.is_moe(layer)]

    @cached_property
    def router_parameters(self) -> frozenset[str]:
        """The names of the routers' parameters, as `by_layer` returns them."""
        model = self.run.model

        def marks(rule: ParamRule, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
            return np.full(leaf.shape[: int(rule.stacked)], rule.group == "router")

        names = by_layer(model, jax.tree.map(marks, model.rules, model.abstract))
        return frozenset(name for name, mark in names.items() if mark)

    def state(self) -> TrainState:
        """Return the state that the next step starts from; restore or initialise it if needed."""
        if self._state is None:
            self._state = restore_or_init_state(self.run, "", lambda line: None)
        return self._state

    def drop_state(self) -> None:
        """Drop the state, so that the next one comes from the newest checkpoint."""
        self._state = None

    @cached_property
    def batch(self) -> Batch:
        """The batch of step 0."""
        with self.feed(0, 1) as feed:
            return next(feed)[1]

    def feed(self, start: int, stop: int) -> DeviceFeed:
        """Make a feed of the run's own batches."""
        where = batch_shardings(self.run.mesh)
        return DeviceFeed(self.run.batches.rows, self.run.microbatch, where, start, stop)

    @cached_property
    def probe(self) -> Probe:
        """The language-model loss, the norms of its gradients, and the routing in training."""
        model = language_model_only(self.run.model)
        gradients = make_gradients(model, self.run.step_options, self.run.mesh)

        def evaluate(params: Any, router: Any, batch: Batch):
            grads, sums, counts = gradients(params, router, batch, jnp.int32(0))
            norms = reduce_leaves(model, grads, leaf_norm)
            return loss_values(sums, counts, model).lm, norms, sums.moe

        compiled = jax.jit(evaluate, out_shardings=replicated(self.run.mesh))
        found = compiled(self.state().params, self.state().router, self.batch)
        loss, norms, moe = jax.device_get(found)
        kept = np.zeros((0, 0)) if moe is None else moe.ledger.expert.kept
        return Probe(float(loss), by_layer(model, norms), kept, moe)

    @cached_property
    def step_fn(self) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
        """The compiled train step, which donates its state."""
        return compile_step(self.run)

    def first_steps(self) -> Steps:
        """Run the first steps once; `state` is then the state after them."""
        if self._steps is None:
            self._steps = self._take_steps()
        return self._steps

    def _take_steps(self) -> Steps:
        mesh, model = self.run.mesh, self.run.model
        marks = jax.jit(lambda p: reduce_leaves(model, p, _bits), out_shardings=replicated(mesh))
        before = by_layer(model, jax.device_get(marks(self.state().params)))
        self._state, metrics = self.step_fn(self.state(), self.batch)
        after = by_layer(model, jax.device_get(marks(self._state.params)))
        changed = {name: np.asarray(old != after[name]) for name, old in before.items()}
        waits, began = [], time.perf_counter()
        with self.feed(1, 1 + STEPS) as feed:
            for number, (_, batch) in enumerate(feed):
                if number == 0:  # its wait includes the start of the feed
                    began = time.perf_counter()
                else:
                    waits.append(feed.last_wait)
                self._state, later = self.step_fn(self._state, batch)
                jax.block_until_ready(later)
        seconds = (time.perf_counter() - began) / STEPS
        return Steps(changed, bool(metrics.skipped), float(np.mean(waits)), seconds)


def language_model_only(model: ModelDef) -> ModelDef:
    """Return the same model without auxiliary losses."""
    config = model.config
    moe = dataclasses.replace(config.moe, balance_weight=0.0, z_weight=0.0)
    config = dataclasses.replace(config, logits_z_weight=0.0, moe=moe)
    return dataclasses.replace(model, config=config)


def reduce_leaves(model: ModelDef, tree: Any, reduce: Callable[[jax.Array, Any], Any]) -> Any:
    """Apply `reduce(leaf, axes)` to every parameter over all axes except layers and experts."""

    def one(names, leaf):
        kept = sum(name in ("layers", "experts") for name in names)
        return reduce(leaf, tuple(range(kept, leaf.ndim)))

    return jax.tree.map(one, model.logical_axes, tree, is_leaf=is_axes)


def by_layer(model: ModelDef, reduced: Any) -> dict[str, np.ndarray]:
    """Convert the result of `reduce_leaves` to a dict: `blocks/3/ffn/w_in_EDUF` -> [E]."""
    return {k: np.asarray(v) for k, v in named_leaves(to_layers(reduced, model.layout)).items()}


def _bits(leaf: jax.Array, axes: Sequence[int]) -> jax.Array:
    return bit_hash(leaf, kept=leaf.ndim - len(axes))


def leaf_norm(leaf: jax.Array, axes: Sequence[int]) -> jax.Array:
    return jnp.sqrt((leaf.astype(jnp.float32) ** 2).sum(tuple(axes)))
