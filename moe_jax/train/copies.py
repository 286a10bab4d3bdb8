"""Copies of the weights in the computation's dtype, written while the optimizer writes the weights.

Layers multiply bfloat16 weights.  Cast from float32 at the head of each step they cost 6 bytes of
memory traffic a weight, written in the pass that has them in registers anyway 2.  They follow from
the parameters, so no checkpoint holds them.
"""

from typing import Any

import jax

from moe_jax.model.define import ModelDef, Params
from moe_jax.nn.params import param_dtype

Copies = dict[str, jax.Array]  # path of a parameter -> it in the computation's dtype


def make_copies(model: ModelDef, params: Params) -> Copies:
    """Of every parameter that the model reads in its own dtype alone; none where that is theirs."""
    return {name: leaf.astype(model.dtype) for name, leaf in of_copied(model, params).items()}


def copy_program(model: ModelDef) -> jax.stages.Wrapped:
    """`make_copies` of parameters as one program; outside jit, each weight would be its own."""

    def copies(params: Params) -> Copies:
        return make_copies(model, params)

    return jax.jit(copies)


def of_copied(model: ModelDef, tree: Params) -> dict[str, Any]:
    """The leaves of a tree like the parameters' that stand for those with a copy, by path."""
    if model.dtype == param_dtype(model.dtype):
        return {}
    leaves = jax.tree.structure(model.narrow).flatten_up_to(tree)
    flags = jax.tree.leaves_with_path(model.narrow)
    return {
        path_name(path): leaf for (path, narrow), leaf in zip(flags, leaves, strict=True) if narrow
    }


def with_copies(params: Params, copies: Copies) -> Params:
    """The parameters with their copies in place of them: what a step's forward pass reads."""
    return jax.tree.map_with_path(lambda path, leaf: copies.get(path_name(path), leaf), params)


def path_name(path: tuple[Any, ...]) -> str:
    """A parameter's key among the copies."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
