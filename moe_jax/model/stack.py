"""The Transformer as pure functions: define once, then init and forward on plain trees.

A parameter tree is nested dicts of arrays: {"embed_VD", "blocks": {"0": ..., ...}, "norm": ...,
"head_DV"}, with "stack" beside "blocks" where layers are scanned (layout.py).
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moe_jax.model.config import ModelConfig
from moe_jax.model.layout import Layout, make_layout, to_stacked
from moe_jax.model.rope import Rope, rope_tables
from moe_jax.model.transformer import Transformer, Trunk, make_block
from moe_jax.moe.types import MoEAux, MoEContext
from moe_jax.nn.remat import remat
from moe_jax.ops.attention import layers_share_calls
from moe_jax.parallel.rules import sharding

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ModelDef:
    """Everything about a model but its parameters."""

    config: ModelConfig
    dtype: Any  # of the computation; parameters are float32 or wider
    layout: Layout
    trunk: nnx.GraphDef  # the Transformer without its blocks
    blocks: tuple[nnx.GraphDef, ...]  # one for each layer
    abstract: Params  # jax.ShapeDtypeStruct of every parameter
    logical_axes: Params  # tuple of logical axis names of every parameter
    narrow: Params  # whether the parameter is read in `dtype` alone


def define(config: ModelConfig, dtype: Any) -> ModelDef:
    """Shapes, logical axes and graph definitions; allocates nothing.

    `config.vocab_size` must be resolved.
    """
    dtype = jnp.dtype(dtype)
    model = nnx.eval_shape(lambda: Transformer(config, dtype=dtype, rngs=nnx.Rngs(0)))
    trunk, blocks, states = _split(model)
    abstract = _map(states, _value)
    axes = _map(states, lambda variable: variable.get_metadata("logical_axes"))
    narrow = _map(states, lambda variable: variable.get_metadata("narrow", False))
    layout = make_layout(config)
    return ModelDef(
        config=config,
        dtype=dtype,
        layout=layout,
        trunk=trunk,
        blocks=blocks,
        abstract=jax.eval_shape(lambda tree: to_stacked(tree, layout), abstract),
        logical_axes=to_stacked(
            axes, layout, lambda *leaves: ("layers", *leaves[0]), is_leaf=is_axes
        ),
        narrow=to_stacked(narrow, layout, lambda *leaves: leaves[0]),
    )


def is_axes(leaf: Any) -> bool:
    """Whether `leaf` is a leaf of a tree of logical axes."""
    return isinstance(leaf, tuple)


def init(model: ModelDef, key: jax.Array) -> Params:
    """Initial parameters: the same for any layout, mesh and JAX device; call it under jit."""
    rngs = nnx.Rngs(params=key)
    states = _split(Transformer(model.config, dtype=model.dtype, rngs=rngs))[2]
    return to_stacked(_map(states, _value), model.layout)


def init_on(model: ModelDef, key: jax.Array, shardings: Params) -> Params:
    """What `init` returns, each leaf laid out as `shardings` says; not for use under jit.

    Each kind of block is compiled once: a program that draws all layers' weights is compiled layer
    by layer (27 s for the 8 layers of bench_olmoe_half on an H200).
    """
    config, layout = model.config, model.layout

    def trunk(key):
        own = Trunk(config, dtype=model.dtype, rngs=nnx.Rngs(params=key))
        return _map(nnx.split(own, nnx.Param)[1], _value)

    def block(layer: int, key, number):
        rngs = nnx.Rngs(params=key)
        own = make_block(config, layer, number, dtype=model.dtype, rngs=rngs)
        return _map(nnx.split(own, nnx.Param)[1], _value)

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


def _value(variable: nnx.Variable) -> Any:
    return variable.get_value()


def _split(model: Transformer) -> tuple[nnx.GraphDef, tuple[nnx.GraphDef, ...], dict[str, Any]]:
    """Graph definitions of trunk and blocks, and a dict tree with their Param variables."""
    pairs = [nnx.split(block, nnx.Param) for block in model.blocks]
    model.blocks = nnx.List([])
    trunk, state = nnx.split(model, nnx.Param)
    blocks = {str(layer): state for layer, (_, state) in enumerate(pairs)}
    return trunk, tuple(graph for graph, _ in pairs), {**state, "blocks": blocks}


def _map(tree: Any, function: Any) -> Any:
    """`function` of every Variable, as plain nested dicts."""
    if isinstance(tree, nnx.Variable):
        return function(tree)
    return {str(key): _map(value, function) for key, value in tree.items()}


def forward(
    model: ModelDef,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    segments_BT: Int[Array, "B T"],
    context: MoEContext,
) -> tuple[Float[Array, "B T D"], MoEAux | None]:
    """All blocks and the last norm.

    Args:
      model, params: from `define` and `init`.
      tokens_BT: token ids below the vocabulary size.
      positions_BT: positions for RoPE.
      segments_BT: document of each token, 0 for padding; read where config.confine_attention.
      context: mesh, mask, keys and router state; `row_keys_B` are folded with the layer here, so
        that scanned and unrolled layers draw the same noise.

    Returns:
      The residual stream after the last norm, and MoEAux with a leading axis over MoE layers in
      their order (None where no layer holds experts).
    """
    config, layout = model.config, model.layout
    # Looked up while split over the width, the rows could only reach their place on the batch axes
    # by a replication of all of them; so each row of the table is whole first.
    table = sharding(context.mesh, ("vocab", None))
    embed_VD = jax.lax.with_sharding_constraint(params["embed_VD"], table)
    trunk = _merge_trunk(model, params | {"embed_VD": embed_VD})
    rope = rope_tables(positions_BT, config.head_dim, config.rope_theta, model.dtype)
    segments = segments_BT if config.confine_attention else None
    shared = (rope, segments, context)

    with jax.named_scope("embedding"):
        x = _constrain(trunk.embed(tokens_BT), context)
    auxes: list[MoEAux] = []
    moe_before = list(itertools.accumulate(map(config.is_moe, range(layout.num_layers)), initial=0))

    # One jitted function for all blocks of a kind: it is traced, differentiated and lowered once.
    # Where no two calls of attention may be equal, each block is a kind of its own.
    share = layers_share_calls()
    kinds = [(config.is_moe(layer), None if share else layer) for layer in range(layout.num_layers)]
    one_of = {kinds[layer]: layer for layer in layout.unrolled()}
    blocks = {kind: jax.jit(_block(model, layer, scanned=False)) for kind, layer in one_of.items()}

    def unrolled(x, layers):
        for layer in layers:
            state = _state_of(context, moe_before[layer]) if config.is_moe(layer) else {}
            x, aux = blocks[kinds[layer]](
                params["blocks"][str(layer)], state, x, jnp.int32(layer), *shared
            )
            auxes.extend([] if aux is None else [jax.tree.map(lambda leaf: leaf[None], aux)])
        return x

    x = unrolled(x, range(layout.prefix))
    if layout.repeats:
        scanned = slice(moe_before[layout.prefix], moe_before[layout.end])
        x, aux = _scan(model, params["stack"], _state_of(context, scanned), x, shared)
        auxes.extend([] if aux is None else [aux])
    x = unrolled(x, range(layout.end, layout.num_layers))
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *auxes) if auxes else None
    return trunk.norm(x), joined


def head_weight(model: ModelDef, params: Params) -> Float[Array, "D V"]:
    """The output projection, which may be the embedding's transpose."""
    return _merge_trunk(model, params).head()


def _merge_trunk(model: ModelDef, params: Params) -> Trunk:
    own = {key: value for key, value in params.items() if key not in ("blocks", "stack")}
    return nnx.merge(model.trunk, own)


def _state_of(context: MoEContext, layers: int | slice) -> dict[str, jax.Array]:
    """Router state of one MoE layer, or of some, counted among MoE layers."""
    return {name: leaf[layers] for name, leaf in context.router_state.items()}


def _constrain(x_BTD, context: MoEContext):
    """Split over rows at block borders: without it XLA may choose to split the width."""
    return jax.lax.with_sharding_constraint(x_BTD, sharding(context.mesh, ("batch", None, None)))


def _block(model: ModelDef, layer: int, *, scanned: bool):
    """Pure function of block `layer` under the remat policy.

    `index` is the layer's number as an array: in a scan the graph definition is that of the
    first repeat.
    """

    def block(params, state, x_BTD, index, rope: Rope, segments, context: MoEContext):
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(context.row_keys_B, index)
        context = dataclasses.replace(context, row_keys_B=keys, router_state=state)
        if context.mesh.size > 1:
            x_BTD, params = _reduce_early(x_BTD, params)
        x_BTD, aux = nnx.merge(model.blocks[layer], params)(x_BTD, rope, segments, context)
        return _constrain(x_BTD, context), aux

    return remat(block, model.config.remat, scanned=scanned)


def _reduce_early(x_BTD, params: Params):
    """Both unchanged; backward, the block before this one waits for this one's FFN gradients.

    So their reduction over devices runs beside the backward pass of this block's attention.  Left
    to itself, XLA computes the gradients of all blocks' weights last and reduces them with nothing
    beside it (two H200s, bench_mixtral_2b: 15 ms of a step of 280 exposed, 4 this way).
    """
    weights = {name: leaf for name, leaf in params["ffn"].items() if name.startswith("w_")}
    x_BTD, weights = _backward_together(x_BTD, weights)
    return x_BTD, params | {"ffn": params["ffn"] | weights}


@jax.custom_vjp
def _backward_together(x_BTD, weights):
    return x_BTD, weights


def _together_forward(x_BTD, weights):
    return (x_BTD, weights), None


def _together_backward(_, gradients):
    # The model casts these weights to its own dtype, so their gradients have no more bits than
    # that: the barrier holds the narrow ones.
    dx_BTD, wide = gradients
    narrow = jax.tree.map(lambda g: g.astype(dx_BTD.dtype), wide)
    dx_BTD, narrow = jax.lax.optimization_barrier((dx_BTD, narrow))
    return dx_BTD, jax.tree.map(lambda n, g: n.astype(g.dtype), narrow, wide)


_backward_together.defvjp(_together_forward, _together_backward)


def _scan(
    model: ModelDef, stacked: Params, router_state: dict[str, jax.Array], x_BTD, shared
) -> tuple[jax.Array, MoEAux | None]:
    """Scan over the repeats of the period; MoEAux comes back in layer order."""
    layout = model.layout
    blocks = [
        _block(model, layout.prefix + position, scanned=True) for position in range(layout.period)
    ]

    def one_repeat(x, inputs):
        repeat, params, states = inputs
        auxes = []
        for position, block in enumerate(blocks):
            index = layout.prefix + repeat * layout.period + position
            is_moe = model.config.is_moe(layout.prefix + position)
            state = {name: leaf[len(auxes)] for name, leaf in states.items()} if is_moe else {}
            x, aux = block(params[str(position)], state, x, index, *shared)
            auxes.extend([] if aux is None else [aux])
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *auxes) if auxes else None

    repeats = jnp.arange(layout.repeats, dtype=jnp.int32)
    # [MoE layers, ...] -> [repeats, MoE layers of a period, ...]
    states = {
        name: leaf.reshape(layout.repeats, -1, *leaf.shape[1:])
        for name, leaf in router_state.items()
    }
    x_BTD, aux = jax.lax.scan(one_repeat, x_BTD, (repeats, stacked, states))
    # [repeats, MoE layers of a period, ...] -> [MoE layers, ...]
    return x_BTD, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), aux)
