"""The train state: its initial value, its sharding on the mesh, and its form on disk."""

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
from moe_jax.model.layout import LayerLayout, to_layers, to_stacked
from moe_jax.moe.components import router_state
from moe_jax.nn.params import ParamRule, param_dtype
from moe_jax.parallel.rules import param_sharding
from moe_jax.train.copies import copy_program, leaves_with_copies, make_copies
from moe_jax.train.guard import first_guard
from moe_jax.train.optim import Optimizer


@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step reads and updates.

    Checkpoints do not hold `copies` and `fall`, because both are computed: compute-dtype copies of
    the weights (copies.py) and the decay of the learning rate (schedule.py).  The fields hold
    arrays, or shapes or shardings in the trees of `abstract_state` and `state_shardings`.
    """

    step: Any  # int32 scalar: steps done
    params: Params  # in float32 or wider (define.py)
    optimizer: Params  # the optimizer state of each parameter, in its place in the tree
    router: Mapping[str, Any]  # name -> [MoE layers, ...]; empty for most routers
    guard: dict[str, Any]  # name -> scalar (guard.py)
    fall: Any  # float [2] from `fall_of`: the decay's end and duration, as an array
    copies: dict[str, Any] = dataclasses.field(default_factory=dict)  # path -> weight


jax.tree_util.register_dataclass(TrainState)


def init_train_state(
    model: ModelDef, optimizer: Optimizer, mesh: Mesh, key: jax.Array
) -> TrainState:
    """Make a fresh state on the devices of `mesh`; not for use under jit.

    Args:
      model: from `define`.
      optimizer: its state is made for every parameter.
      mesh: from `make_mesh`.
      key: PRNG key of the initial parameters.

    Returns:
      A state whose parameters are the same for any mesh and layout.

    Raises:
      UserError: the optimizer cannot be applied to one of the parameters.
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
    """Put `TrainState.fall` of a run on every device; compiles nothing."""
    fall = optimizer.fall
    return jax.make_array_from_callback(fall.shape, replicated(mesh), lambda index: fall[index])


def initial_router_state(model: ModelDef) -> dict[str, jax.Array]:
    """The router state before the first step: name -> [MoE layers, ...]."""
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


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that replicates an array on all devices."""
    return NamedSharding(mesh, P())


def param_shardings(model: ModelDef, mesh: Mesh) -> Params:
    """The sharding of every parameter, from its logical axes."""
    return jax.tree.map(
        lambda axes, leaf: param_sharding(mesh, axes, leaf.shape),
        model.logical_axes,
        model.abstract,
        is_leaf=is_axes,
    )


def leading_axes(rule: ParamRule) -> tuple[int, ...]:
    """The axes of a parameter that index its matrices; first in optimizer state kept per matrix."""
    return (*range(rule.stacked), *rule.matrices)


def is_by_matrix(rule: ParamRule, param: jax.ShapeDtypeStruct, leaf: jax.ShapeDtypeStruct) -> bool:
    """True for optimizer state kept per matrix of a parameter that holds several matrices.

    Args:
      rule: of the parameter.
      param: the parameter.
      leaf: of its optimizer state.

    Returns:
      Whether the state begins with the `leading_axes` of the parameter.
    """
    first = tuple(param.shape[axis] for axis in leading_axes(rule))
    return bool(rule.matrices) and leaf.shape[: len(first)] == first


def state_shardings(model: ModelDef, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """The sharding of every leaf of the state.

    Optimizer state with the parameter's shape is sharded like the parameter.  Optimizer state kept
    per matrix is sharded like the axes that index the matrices.  Everything smaller is replicated.
    """
    whole = replicated(mesh)
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
    return TrainState(
        whole, params, moments, router, guard, whole, leaves_with_copies(model, params)
    )


def checkpoint_bytes(model: ModelDef, optimizer: Optimizer) -> int:
    """Disk bytes that one checkpoint needs, plus a margin."""
    return disk_needed(dataclasses.replace(abstract_state(model, optimizer), copies={}))


def to_disk(state: TrainState, layout: LayerLayout) -> dict[str, Any]:
    """Convert a state to its form on disk, which has one leaf per layer.

    The stacked leaves of scanned layers are split; unrolled states are unchanged.  Copies and
    `fall` are left out.
    """
    return {
        "step": state.step,
        "params": to_layers(state.params, layout),
        "optimizer": to_layers(state.optimizer, layout),
        "router": state.router,
        "guard": state.guard,
    }


def from_disk(tree: dict[str, Any], model: ModelDef, fall: jax.Array) -> TrainState:
    """Convert the form on disk to a state: the inverse of `to_disk`.

    Args:
      tree: the result of `to_disk`, restored.
      model: its layout decides which layers are stacked.
      fall: of the run that continues.

    Returns:
      The state, with its copies made from the parameters.
    """
    params = to_stacked(tree["params"], model.layout)
    moments = to_stacked(tree["optimizer"], model.layout)
    copies = copy_program(model)(params) if leaves_with_copies(model, params) else {}
    return TrainState(tree["step"], params, moments, tree["router"], tree["guard"], fall, copies)


def all_finite(state: TrainState, mesh: Mesh) -> bool:
    """True if every number of the state is finite; waits for the result.

    A step with finite loss and gradient can still overflow parameters or moments.
    """
    return bool(_finite_check(mesh)(state))


@functools.cache
def _finite_check(mesh: Mesh) -> jax.stages.Wrapped:
    def check(state: TrainState) -> jax.Array:
        floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
        return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()

    return jax.jit(check, out_shardings=replicated(mesh))
