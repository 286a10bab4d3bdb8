"""Resolves a config and lowers its train step for devices that need not be attached."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from moe_jax.config import Config
from moe_jax.data.tokenizers import config_tokenizer
from moe_jax.model.define import ModelDef, define
from moe_jax.model.flops import flops_per_token
from moe_jax.parallel.mesh import AXES, MeshConfig, make_mesh
from moe_jax.parallel.rules import spec
from moe_jax.run import resolve
from moe_jax.run.context import make_optimizer, make_step_options, microbatch_of
from moe_jax.train.copies import path_name
from moe_jax.train.optim import Optimizer
from moe_jax.train.state import abstract_state, is_by_matrix, leading_axes, placed_state
from moe_jax.train.step import abstract_batch, jit_train_step


class Leaf(NamedTuple):
    """One parameter (of scanned layers: one stack of all layers) and its optimizer state."""

    name: str
    axes: tuple[str | None, ...]  # logical
    shape: tuple[int, ...]
    size: int  # number of elements
    bytes: int
    copy: int  # bytes of its compute-dtype copy; 0: none
    beside: int  # bytes of optimizer state of the same shape, split in the same way
    by_matrix: int  # bytes of optimizer state kept per matrix, split over the matrices
    leading: tuple[int, ...]  # the axes over which `by_matrix` is split
    whole: int  # bytes of other optimizer state, replicated on every device


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config resolved for a number of devices."""

    asked: Config  # as the user wrote it
    config: Config  # resolved
    model: ModelDef
    optimizer: Optimizer
    mesh: AbstractMesh  # its axes, without devices
    leaves: tuple[Leaf, ...]
    flops: float  # model FLOPs per token, forward and backward
    notes: list[str]

    @property
    def tokens(self) -> int:
        """The tokens per step."""
        return self.config.train.batch_size * self.config.data.sequence_length


def make_plan(config: Config, num_devices: int) -> Plan:
    """Make the plan of what `python -m moe_jax train` would run on `num_devices` devices.

    Raises:
      UserError: the trainer would refuse the config before it compiles.
    """
    vocabulary = config.model.vocab_size or config_tokenizer(config.data).vocab_size
    asked = config
    config, components, notes = resolve.resolve(config, num_devices, vocabulary)
    model = define(config.model, jnp.dtype(config.precision), components)
    mesh = abstract_mesh(config.mesh)
    resolve.check_shapes(model, mesh)
    flops = flops_per_token(model, config.data.sequence_length)
    optimizer = make_optimizer(config, model)
    leaves = _leaves(model, optimizer)
    return Plan(asked, config, model, optimizer, mesh, leaves, flops, notes)


def _leaves(model: ModelDef, optimizer: Optimizer) -> tuple[Leaf, ...]:
    state = abstract_state(model, optimizer)
    params = jax.tree.leaves_with_path(state.params)
    rules = jax.tree.leaves(model.rules)
    moments = jax.tree.structure(state.params).flatten_up_to(state.optimizer)
    paths = jax.tree.map_with_path(lambda path, _: path_name(path), state.params)
    found = []
    for (path, param), name, rule, tree in zip(
        params, jax.tree.leaves(paths), rules, moments, strict=True
    ):
        beside = by_matrix = whole = 0
        for leaf in jax.tree.leaves(tree):
            if leaf.shape == param.shape:
                beside += _bytes(leaf)
            elif is_by_matrix(rule, param, leaf):
                by_matrix += _bytes(leaf)
            else:
                whole += _bytes(leaf)
        size = math.prod(param.shape)
        copy = _bytes(state.copies[name]) if name in state.copies else 0
        state_of = beside, by_matrix, leading_axes(rule), whole
        found.append(
            Leaf(path[-1].key, rule.axes, param.shape, size, _bytes(param), copy, *state_of)
        )
    return tuple(found)


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def split_ways(
    axes: Sequence[str | None], sizes: Mapping[str, int], over: Sequence[str] = AXES
) -> int:
    """The number of parts into which the mesh axes `over` split a parameter.

    Args:
      axes: logical axes of the parameter.
      sizes: mesh axis -> its size.
      over: the mesh axes that count.
    """
    ways = 1
    for entry in spec(axes):
        for axis in entry if isinstance(entry, tuple) else (entry,):
            ways *= sizes[axis] if axis in over else 1
    return ways


def replan(plan: Plan, mesh: MeshConfig, remat: str, batch_size: int, accumulation: int) -> Plan:
    """Plan the same model with another mesh, remat policy and batch.

    Args:
      plan: the plan to change.
      mesh: the new mesh.
      remat: name of the new remat policy.
      batch_size: rows per step.
      accumulation: microbatches per step.

    Raises:
      UserError: the trainer would refuse the config before it compiles.
    """
    config = dataclasses.replace(
        plan.asked,
        mesh=mesh,
        model=dataclasses.replace(plan.asked.model, remat=remat),
        train=dataclasses.replace(
            plan.asked.train, batch_size=batch_size, accumulation=accumulation
        ),
    )
    devices = math.prod(dataclasses.astuple(mesh))
    found = resolve.resolve(config, devices, plan.config.model.vocab_size)
    config, notes = found.config, found.notes
    model = dataclasses.replace(plan.model, config=config.model, components=found.components)
    resolve.check_shapes(model, abstract_mesh(mesh))
    return dataclasses.replace(
        plan, config=config, model=model, mesh=abstract_mesh(mesh), notes=notes
    )


def abstract_mesh(mesh: MeshConfig) -> AbstractMesh:
    """Make a mesh of these sizes without devices."""
    return AbstractMesh(dataclasses.astuple(mesh), AXES)


def lower(plan: Plan, devices: Sequence[Any]) -> jax.stages.Lowered:
    """Lower the train step for these devices."""
    config, model, optimizer = plan.config, plan.model, plan.optimizer
    mesh = make_mesh(config.mesh, devices)
    state = placed_state(model, optimizer, mesh)
    step = jit_train_step(model, optimizer, make_step_options(config), mesh)
    return step.lower(state, abstract_batch(microbatch_of(config), mesh))
