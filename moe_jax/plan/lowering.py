"""The train step of a config, resolved and lowered for devices that need not be here."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from moe_jax.config import Config
from moe_jax.data.pipeline import Batch
from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.model.stack import ModelDef, define
from moe_jax.optim import Optimizer
from moe_jax.parallel.mesh import AXES, make_mesh
from moe_jax.parallel.rules import sharding
from moe_jax.train import resolve
from moe_jax.train.state import abstract_state, state_shardings
from moe_jax.train.step import StepOptions, jit_train_step


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config resolved for a number of devices."""

    config: Config
    model: ModelDef
    optimizer: Optimizer
    mesh: Any  # an AbstractMesh: its axes, without devices
    notes: list[str]


def make_plan(config: Config, num_devices: int) -> Plan:
    """What `moe_jax.train` would run on so many devices.

    Raises:
      UserError: what the trainer refuses before it compiles.
    """
    vocabulary = config.model.vocab_size or load_tokenizer(config.data.tokenizer).vocab_size
    config, notes = resolve.resolve(config, num_devices, vocabulary)
    model = define(config.model, jnp.dtype(config.precision))
    mesh = AbstractMesh(tuple(dataclasses.asdict(config.mesh).values()), AXES)
    resolve.check_shapes(model, mesh)
    return Plan(config, model, Optimizer(config.optimizer, config.train.steps), mesh, notes)


def lower(plan: Plan, devices: Sequence[Any]) -> jax.stages.Lowered:
    """The train step, lowered for these devices."""
    config, model, optimizer = plan.config, plan.model, plan.optimizer
    mesh = make_mesh(config.mesh, devices)
    state = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract_state(model, optimizer),
        state_shardings(model, optimizer, mesh),
    )
    step = jit_train_step(model, optimizer, StepOptions.of(config), mesh)
    return step.lower(state, abstract_batch(config, mesh))


def abstract_batch(config: Config, mesh: Any) -> Batch:
    """The batch of one step as a feed hands it over."""
    parts = config.train.accumulation
    rows = (parts, config.train.batch_size // parts)
    shape = (*rows, config.data.sequence_length)
    tokens = sharding(mesh, (None, "batch", None))
    whole = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=tokens)
    mask = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=tokens)
    row = jax.ShapeDtypeStruct(rows, jnp.int32, sharding=sharding(mesh, (None, "batch")))
    return Batch(*[whole] * 7, row)._replace(loss_mask_BT=mask)
