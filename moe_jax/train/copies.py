"""Compute-dtype copies of the weights, which the optimizer update writes together with the weights.

Layers multiply bfloat16 weights.  Casting them from float32 at the start of each step costs 6 bytes
of memory traffic per weight.  Writing the copy in the optimizer update, which has the weight in
registers, costs 2.  Copies are computed from the parameters, so checkpoints do not hold them.
"""

from typing import Any

import jax

from moe_jax.model.define import ModelDef, Params
from moe_jax.nn.params import param_dtype

Copies = dict[str, jax.Array]  # path of a parameter -> its copy in the compute dtype


def make_copies(model: ModelDef, params: Params) -> Copies:
    """Copy every parameter that the model reads only in the compute dtype.

    The result is empty if parameters already have the compute dtype.
    """
    return {
        name: leaf.astype(model.dtype) for name, leaf in leaves_with_copies(model, params).items()
    }


def copy_program(model: ModelDef) -> jax.stages.Wrapped:
    """Make one program of `make_copies`; outside jit each weight would be a program of its own."""

    def copies(params: Params) -> Copies:
        return make_copies(model, params)

    return jax.jit(copies)


def leaves_with_copies(model: ModelDef, tree: Params) -> dict[str, Any]:
    """Select, by path, the leaves of a parameter-like tree whose parameter has a copy."""
    if model.dtype == param_dtype(model.dtype):
        return {}
    leaves = jax.tree.structure(model.compute_dtype_only).flatten_up_to(tree)
    flags = jax.tree.leaves_with_path(model.compute_dtype_only)
    return {path_name(path): leaf for (path, flag), leaf in zip(flags, leaves, strict=True) if flag}


def with_copies(params: Params, copies: Copies) -> Params:
    """Replace parameters by their copies, for the forward pass of a step."""
    return jax.tree.map_with_path(lambda path, leaf: copies.get(path_name(path), leaf), params)


def path_name(path: tuple[Any, ...]) -> str:
    """The key of a parameter in `Copies`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
