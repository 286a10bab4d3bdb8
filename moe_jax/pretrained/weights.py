"""Reads the parameters and router state of a checkpoint, without its optimizer, on any mesh."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from moe_jax.checkpoint import Checkpoints
from moe_jax.model.define import ModelDef, Params, define
from moe_jax.model.layout import to_stacked
from moe_jax.train.state import initial_router_state, param_shardings, replicated


def newest_good_step(checkpoints: Checkpoints) -> int | None:
    """The newest step that verifies; None if there is none.

    Unlike `Checkpoints.latest_good` it moves no step: the run may belong to another user, and may
    still be training.
    """
    bad: set[int] = set()
    # Listed again each time: a live run adds steps, and may delete the one just found bad.
    while steps := [step for step in checkpoints.steps() if step not in bad]:
        if checkpoints.examine(steps[-1]) is None:
            return steps[-1]
        bad.add(steps[-1])
    return None


def read_params(checkpoints: Checkpoints, step: int, model: ModelDef, mesh: Mesh) -> Params:
    """Read the parameters of a step that verifies.

    Args:
      checkpoints: checkpoints of any run of the same model, with scanned layers or not.
      step: the step to read.
      model: the model that defines the returned parameter tree.
      mesh: mesh for the parameters, each sharded by its logical axes.

    Raises:
      UserError: a parameter is missing, unknown, or has another shape or dtype.
    """
    # On disk, layers are always stored separately.
    flat = define(
        dataclasses.replace(model.config, scan_layers=False), model.dtype, model.components
    )
    target = _placed(flat.abstract, param_shardings(flat, mesh))
    params = checkpoints.restore_subtree(step, "params", target)
    if not model.layout.repeats:
        return params
    where = param_shardings(model, mesh)
    return jax.jit(lambda params: to_stacked(params, model.layout), out_shardings=where)(params)


def router_state_names(checkpoints: Checkpoints, step: int) -> list[str]:
    """Names of the router state that a step holds, sorted; empty for most routers."""
    names = (name.split("/") for name in checkpoints.describe(step))
    return sorted(parts[1] for parts in names if parts[0] == "router")


def read_router_state(
    checkpoints: Checkpoints, step: int, model: ModelDef, mesh: Mesh
) -> dict[str, jax.Array]:
    """Read the router state of a step that verifies: name -> [MoE layers, ...], replicated.

    Raises:
      UserError: the state of the step differs from that of the routers of `model`.
    """
    state = jax.eval_shape(lambda: initial_router_state(model))
    target = _placed(state, jax.tree.map(lambda _: replicated(mesh), state))
    return checkpoints.restore_subtree(step, "router", target)


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        shardings,
    )
