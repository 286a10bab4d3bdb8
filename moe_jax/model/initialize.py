"""Draws the initial parameters, which are the same for any layout and mesh."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.model.define import ModelDef, Params, map_variables, split_model, value_of
from moe_jax.model.layout import to_stacked
from moe_jax.model.transformer import Transformer, Trunk, make_block


def init(model: ModelDef, key: jax.Array) -> Params:
    """Draw the initial parameters, the same for any layout, mesh and device; call it under jit.

    Args:
      model: from `define`.
      key: PRNG key; a parameter depends only on the key, the layer and the parameter's name.

    Returns:
      A tree like `model.abstract`.
    """
    rngs = nnx.Rngs(params=key)
    states = split_model(Transformer(model.config, model.components, dtype=model.dtype, rngs=rngs))[
        2
    ]
    return to_stacked(map_variables(states, value_of), model.layout)


def init_on(model: ModelDef, key: jax.Array, shardings: Params) -> Params:
    """Draw the parameters of `init` with the given shardings; not for use under jit.

    Each kind of block is compiled once.  In one program for all layers, XLA would compile each
    layer separately (27 s for the 8 layers of bench_olmoe_half on an H200).

    Args:
      model: from `define`.
      key: PRNG key, as for `init`.
      shardings: a tree like `model.abstract`.

    Returns:
      A tree like `model.abstract`.
    """
    config, layout = model.config, model.layout

    def trunk(key):
        own = Trunk(config, dtype=model.dtype, rngs=nnx.Rngs(params=key))
        return map_variables(nnx.split(own, nnx.Param)[1], value_of)

    def block(layer: int, key, number):
        rngs = nnx.Rngs(params=key)
        own = make_block(config, model.components, layer, number, dtype=model.dtype, rngs=rngs)
        return map_variables(nnx.split(own, nnx.Param)[1], value_of)

    outside = {name: leaf for name, leaf in shardings.items() if name not in ("blocks", "stack")}
    params = jax.jit(trunk, out_shardings=outside)(key)
    of_kind: dict[bool, Any] = {}
    params["blocks"] = {}
    for layer in layout.unrolled():
        if config.is_moe(layer) not in of_kind:
            of_kind[config.is_moe(layer)] = jax.jit(
                functools.partial(block, layer), out_shardings=shardings["blocks"][str(layer)]
            )
        params["blocks"][str(layer)] = of_kind[config.is_moe(layer)](key, jnp.int32(layer))
    for position, where in shardings.get("stack", {}).items():
        first = layout.prefix + int(position)
        draw = functools.partial(jax.lax.map, functools.partial(block, first, key))
        numbers = jnp.arange(first, layout.end, layout.period, dtype=jnp.int32)
        params.setdefault("stack", {})[position] = jax.jit(draw, out_shardings=where)(numbers)
    return params
