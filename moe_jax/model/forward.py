"""The forward pass as a pure function of the parameter tree; layers are unrolled or scanned.

B rows, T positions, D model width, V vocabulary.
"""

import dataclasses
import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from moe_jax.data.batch import Batch
from moe_jax.model.define import ModelDef, Params
from moe_jax.model.early_reduce import reduce_early
from moe_jax.model.rope import Rope, rope_tables
from moe_jax.model.transformer import Trunk
from moe_jax.moe.types import MoEAux, MoEContext
from moe_jax.nn.remat import remat
from moe_jax.ops.attention import layers_share_calls
from moe_jax.parallel.rules import constrain

# Axes of the residual stream at block borders; without a constraint XLA may split the width.
ROWS = ("batch", None, None)


def batch_context(
    batch: Batch,
    row_keys_B: jax.Array,
    mesh: Mesh,
    train: bool,
    router_state: Mapping[str, jax.Array],
    num_sources: int,
) -> MoEContext:
    """Make the context that the MoE layers of a forward pass over `batch` share.

    Args:
      batch: with axes B, T.
      row_keys_B: a typed PRNG key per row.
      mesh: with the axes of parallel/mesh.py.
      train: capacity, noise and dropout are those of training.
      router_state: with a leading axis over MoE layers; empty: none.
      num_sources: sources of the data; the ids in `batch.sources_BT` are below it.
    """
    return MoEContext(
        token_ids_BT=batch.tokens_BT,
        mask_BT=batch.segments_BT > 0,
        row_keys_B=row_keys_B,
        mesh=mesh,
        train=train,
        router_state=router_state,
        sources_BT=batch.sources_BT,
        num_sources=num_sources,
    )


def forward(
    model: ModelDef,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    segments_BT: Int[Array, "B T"],
    context: MoEContext,
) -> tuple[Float[Array, "B T D"], MoEAux | None]:
    """Run the embedding, all blocks and the last norm.

    Args:
      model, params: from `define` and `init`.
      tokens_BT: token ids below the vocabulary size.
      positions_BT: positions for RoPE.
      segments_BT: document of each token, 0 for padding; read if config.confine_attention is set.
      context: mesh, mask, keys and router state; `row_keys_B` are folded with the layer here, so
        that scanned and unrolled layers draw the same noise.

    Returns:
      The residual stream after the last norm, and MoEAux with a leading axis over MoE layers, in
      layer order (None for a dense model).

    Raises:
      UserError: the MoE layers cannot use the context, or their groups do not divide the rows.
    """
    config, layout = model.config, model.layout
    # Unshard the width before the lookup.  Otherwise XLA can move the rows to the batch axes only
    # by replicating them.
    embed_VD = constrain(params["embed_VD"], context.mesh, ("vocab", None))
    trunk = _merge_trunk(model, params | {"embed_VD": embed_VD})
    rope = rope_tables(positions_BT, config.head_dim, config.rope_theta, model.dtype)
    segments = segments_BT if config.confine_attention else None
    shared = (rope, segments, context)

    with jax.named_scope("embedding"):
        x = constrain(trunk.embed(tokens_BT), context.mesh, ROWS)
    auxes: list[MoEAux] = []
    moe_before = list(itertools.accumulate(map(config.is_moe, range(layout.num_layers)), initial=0))

    # One jitted function for all blocks of a kind, so that it is traced, differentiated and lowered
    # once.  If attention has to know its layer, each block is a kind of its own.
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
    """The output projection; with a tied head, the transposed embedding."""
    return _merge_trunk(model, params).head()


def _merge_trunk(model: ModelDef, params: Params) -> Trunk:
    own = {key: value for key, value in params.items() if key not in ("blocks", "stack")}
    return nnx.merge(model.trunk, own)


def _state_of(context: MoEContext, layers: int | slice) -> dict[str, jax.Array]:
    """The router state of one MoE layer or of a slice, indexed among MoE layers."""
    return {name: leaf[layers] for name, leaf in context.router_state.items()}


def _block(model: ModelDef, layer: int, *, scanned: bool):
    """Make the pure function of block `layer` under the remat policy.

    The function takes the layer's number as an array, `index`, because in a scan all repeats share
    the graph definition of the first.
    """

    def block(params, state, x_BTD, index, rope: Rope, segments, context: MoEContext):
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(context.row_keys_B, index)
        context = dataclasses.replace(context, row_keys_B=keys, router_state=state)
        if context.mesh is not None and context.mesh.size > 1:
            x_BTD, params = reduce_early(x_BTD, params)
        x_BTD, aux = nnx.merge(model.blocks[layer], params)(x_BTD, rope, segments, context)
        return constrain(x_BTD, context.mesh, ROWS), aux

    return remat(block, model.config.remat, scanned=scanned)


def _scan(
    model: ModelDef, stacked: Params, router_state: dict[str, jax.Array], x_BTD, shared
) -> tuple[jax.Array, MoEAux | None]:
    """Scan over the repeats of the period; returns MoEAux in layer order."""
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
