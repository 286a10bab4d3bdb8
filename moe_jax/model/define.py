"""`ModelDef`: a model without its parameters, as graph definitions and plain trees.

A parameter tree is nested dicts of arrays: {"embed_VD", "blocks": {"0": ..., ...}, "norm": ...,
"head_DV"}, plus "stack" for scanned layers (layout.py).  V vocabulary, D model width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from moe_jax.model.config import ModelConfig
from moe_jax.model.layout import LayerLayout, make_layout, to_stacked
from moe_jax.model.transformer import Transformer
from moe_jax.moe.components import Components
from moe_jax.nn.params import ParamRule

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ModelDef:
    """A model without its parameters."""

    config: ModelConfig  # the model's shape
    components: Components | None  # of its MoE layers; None: dense model
    dtype: np.dtype  # compute dtype; parameters are float32 or wider
    layout: LayerLayout  # which layers are unrolled and which are scanned
    trunk: nnx.GraphDef  # the Transformer without its blocks
    blocks: tuple[nnx.GraphDef, ...]  # one for each layer
    abstract: Params  # jax.ShapeDtypeStruct of every parameter
    logical_axes: Params  # tuple of logical axis names of every parameter
    rules: Params  # ParamRule of every parameter, for the optimizer
    compute_dtype_only: Params  # True for parameters that the model reads only in `dtype`


def define(config: ModelConfig, dtype: DTypeLike, components: Components | None = None) -> ModelDef:
    """Make the definition of a model: shapes, logical axes, graph definitions; allocates nothing.

    Args:
      config: the model's shape; `vocab_size` must be above 0.
      dtype: compute dtype; parameters are float32 or wider.
      components: router and dispatch path of its MoE layers; None: those that `config.moe` names.

    Returns:
      The definition that `init`, `forward` and the train step take.

    Raises:
      UserError: as `Transformer`.
    """
    dtype = jnp.dtype(dtype)

    def make() -> Transformer:
        return Transformer(config, components, dtype=dtype, rngs=nnx.Rngs(0))

    model = nnx.eval_shape(make)
    trunk, blocks, states = split_model(model)
    layout = make_layout(config)
    abstract = map_variables(states, value_of)
    rules = to_stacked(map_variables(states, rule_of), layout, lambda *leaves: leaves[0].stack())
    compute_dtype_only = map_variables(
        states, lambda variable: variable.get_metadata("compute_dtype_only", False)
    )
    return ModelDef(
        config=config,
        components=model.components,
        dtype=dtype,
        layout=layout,
        trunk=trunk,
        blocks=blocks,
        abstract=jax.eval_shape(lambda tree: to_stacked(tree, layout), abstract),
        logical_axes=jax.tree.map(lambda rule: rule.axes, rules),
        rules=rules,
        compute_dtype_only=to_stacked(compute_dtype_only, layout, lambda *leaves: leaves[0]),
    )


def is_axes(leaf: Any) -> bool:
    """True if `leaf` is a leaf of a tree of logical axes."""
    return isinstance(leaf, tuple)


def value_of(variable: nnx.Variable) -> Any:
    """The array that a variable holds."""
    return variable.get_value()


def rule_of(variable: nnx.Variable) -> ParamRule:
    """The ParamRule of a parameter of one layer, from its metadata."""
    return ParamRule(variable.get_metadata("group"), variable.get_metadata("logical_axes"))


def split_model(
    model: Transformer,
) -> tuple[nnx.GraphDef, tuple[nnx.GraphDef, ...], dict[str, Any]]:
    """Split a model into graph definitions of trunk and blocks and a tree of Param variables."""
    pairs = [nnx.split(block, nnx.Param) for block in model.blocks]
    model.blocks = nnx.List([])
    trunk, state = nnx.split(model, nnx.Param)
    blocks = {str(layer): state for layer, (_, state) in enumerate(pairs)}
    return trunk, tuple(graph for graph, _ in pairs), {**state, "blocks": blocks}


def map_variables(tree: Any, function: Any) -> Any:
    """Apply `function` to every Variable; returns plain nested dicts."""
    if isinstance(tree, nnx.Variable):
        return function(tree)
    return {str(key): map_variables(value, function) for key, value in tree.items()}
