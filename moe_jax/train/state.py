"""What a run carries from step to step, where it lies on the mesh, and its form on disk."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.checkpoint import disk_needed
from moe_jax.model.define import ModelDef, Params, is_axes
from moe_jax.model.initialize import init_on
from moe_jax.model.layout import Layout, to_layers, to_stacked
from moe_jax.moe.components import router_state
from moe_jax.nn.params import ParamRule, param_dtype
from moe_jax.parallel.rules import param_sharding
from moe_jax.train.copies import copy_program, make_copies, of_copied
from moe_jax.train.guard import first_guard
from moe_jax.train.optim import Optimizer


@dataclasses.dataclass(frozen=True)
class TrainState:
    """Step counter, parameters, the optimizer's state leaf by leaf beside them, router, guard.

    And what follows from these or from the config, which no checkpoint holds: copies of weights in
    the computation's dtype (copies.py), and where the learning rate falls (schedule.py).
    """

    step: Any  # int32 scalar; like the others, a shape or a sharding where those are asked for
    params: Params  # in float32 or wider (define.py)
    optimizer: Params  # the state of each parameter in its place
    router: Mapping[str, Any]  # name -> [MoE layers, ...]; empty for most routers
    guard: dict[str, Any]  # name -> scalar (guard.py)
    fall: Any  # float [2] of `fall_of`: an array, as one program serves runs of any length
    copies: dict[str, Any] = dataclasses.field(default_factory=dict)  # path -> weight


jax.tree_util.register_dataclass(TrainState)


def init_train_state(
    model: ModelDef, optimizer: Optimizer, mesh: Mesh, key: jax.Array
) -> TrainState:
    """A fresh state on the devices of `mesh`; not for use under jit.

    Args:
      model: of `define`.
      optimizer: whose moments are made beside the parameters.
      mesh: of `make_mesh`.
      key: PRNG key of the initial parameters.

    Returns:
      A state whose parameters are the same for any mesh and layout.

    Raises:
      UserError: an optimizer that cannot be applied to one of the parameters.
    """
    where = state_shardings(model, optimizer, mesh)
    params = init_on(model, key, where.params)

    def rest(params):
        step, guard = jnp.zeros((), jnp.int32), first_guard(param_dtype(model.dtype))
        copies = make_copies(model, params)
        return step, optimizer.init(params, model.rules), initial_router_state(model), guard, copies

    places = (where.step, where.optimizer, where.router, where.guard, where.copies)
    step, moments, router, guard, copies = jax.jit(rest, out_shardings=places)(params)
    return TrainState(step, params, moments, router, guard, placed_fall(optimizer, mesh), copies)


def placed_fall(optimizer: Optimizer, mesh: Mesh) -> jax.Array:
    """`TrainState.fall` of a run, on every device; nothing is compiled."""
    fall = optimizer.fall
    return jax.make_array_from_callback(fall.shape, everywhere(mesh), lambda index: fall[index])


def initial_router_state(model: ModelDef) -> dict[str, jax.Array]:
    """What the routers carry before the first step: name -> [MoE layers, ...]."""
    config, parts = model.config, model.components
    if parts is None:
        return {}
    experts, layers = config.moe.num_experts, config.moe_layers
    return router_state(parts.router, experts, layers, param_dtype(model.dtype))


def abstract_state(model: ModelDef, optimizer: Optimizer) -> TrainState:
    """Shapes and dtypes of the state; allocates nothing."""
    optimizer_state = jax.eval_shape(lambda p: optimizer.init(p, model.rules), model.abstract)
    router = jax.eval_shape(lambda: initial_router_state(model))
    guard = jax.eval_shape(lambda: first_guard(param_dtype(model.dtype)))
    step = jax.ShapeDtypeStruct((), jnp.int32)
    copies = jax.eval_shape(lambda params: make_copies(model, params), model.abstract)
    fall = jax.ShapeDtypeStruct(optimizer.fall.shape, optimizer.fall.dtype)
    return TrainState(step, model.abstract, optimizer_state, router, guard, fall, copies)


def placed_state(model: ModelDef, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """`abstract_state` with the sharding of every leaf on `mesh`."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract_state(model, optimizer),
        state_shardings(model, optimizer, mesh),
    )


def everywhere(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, P())


def param_shardings(model: ModelDef, mesh: Mesh) -> Params:
    """Sharding of every parameter, from its logical axes."""
    return jax.tree.map(
        lambda axes, leaf: param_sharding(mesh, axes, leaf.shape),
        model.logical_axes,
        model.abstract,
        is_leaf=is_axes,
    )


def leading_axes(rule: ParamRule) -> tuple[int, ...]:
    """Axes of a parameter that come first in what an optimizer keeps of each matrix."""
    return (*range(rule.stacked), *rule.matrices)


def is_by_matrix(rule: ParamRule, param: jax.ShapeDtypeStruct, leaf: jax.ShapeDtypeStruct) -> bool:
    """True for optimizer state with `leading_axes` of a parameter that holds several matrices."""
    first = tuple(param.shape[axis] for axis in leading_axes(rule))
    return bool(rule.matrices) and leaf.shape[: len(first)] == first


def state_shardings(model: ModelDef, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """Sharding of every leaf: moments lie as their parameter does, anything smaller everywhere.

    What an optimizer keeps of each matrix lies as the axes do that tell the matrices apart.
    """
    whole = everywhere(mesh)
    params = param_shardings(model, mesh)
    state = abstract_state(model, optimizer)

    def beside(rule, param, where, leaves):
        first = leading_axes(rule)
        of_matrices = NamedSharding(mesh, P(*(where.spec[axis] for axis in first)))

        def place(leaf):
            if leaf.shape == param.shape:
                return where
            return of_matrices if is_by_matrix(rule, param, leaf) else whole

        return jax.tree.map(place, leaves)

    moments = jax.tree.map(beside, model.rules, state.params, params, state.optimizer)
    router, guard = jax.tree.map(lambda _: whole, (state.router, state.guard))
    return TrainState(whole, params, moments, router, guard, whole, of_copied(model, params))


def checkpoint_bytes(model: ModelDef, optimizer: Optimizer) -> int:
    """Of one checkpoint, rounded up a little."""
    return disk_needed(dataclasses.replace(abstract_state(model, optimizer), copies={}))


def to_disk(state: TrainState, layout: Layout) -> dict[str, Any]:
    """The one form on disk: per-layer leaves under `params` and `optimizer`, whatever is scanned.

    Stacked leaves are cut on the host's side of a save where they are cut at all: unrolled states
    pass through untouched.  Copies and `fall` are left out.
    """
    return {
        "step": state.step,
        "params": to_layers(state.params, layout),
        "optimizer": to_layers(state.optimizer, layout),
        "router": state.router,
        "guard": state.guard,
    }


def from_disk(tree: dict[str, Any], model: ModelDef, fall: jax.Array) -> TrainState:
    """Inverse of `to_disk`, for a run with this `fall`."""
    params = to_stacked(tree["params"], model.layout)
    moments = to_stacked(tree["optimizer"], model.layout)
    copies = copy_program(model)(params) if of_copied(model, params) else {}
    return TrainState(tree["step"], params, moments, tree["router"], tree["guard"], fall, copies)


def all_finite(state: TrainState, mesh: Mesh) -> bool:
    """Whether every number of the state is finite; waits for it.

    A step whose loss and gradient are finite can still overflow what it updates.
    """
    return bool(_finite_check(mesh)(state))


@functools.cache
def _finite_check(mesh: Mesh) -> jax.stages.Wrapped:
    def check(state: TrainState) -> jax.Array:
        floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
        return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()

    return jax.jit(check, out_shardings=everywhere(mesh))
