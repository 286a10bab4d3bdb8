"""The forward pass as a pure function of the parameter tree, its layers unrolled or scanned."""

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

# Of the residual stream at block borders: without them XLA may choose to split the width.
ROWS = ("batch", None, None)


def batch_context(
    batch: Batch,
    row_keys_B: jax.Array,
    mesh: Mesh,
    train: bool,
    router_state: Mapping[str, jax.Array],
    num_sources: int,
) -> MoEContext:
    """What the MoE layers of a forward pass over `batch` share.

    Args:
      batch: of axes B, T.
      row_keys_B: a typed PRNG key per row.
      mesh: with the axes of parallel/mesh.py.
      train: capacity, noise and dropout are those of training.
      router_state: with a leading axis over MoE layers; empty: none.
      num_sources: of the data; the ids in `batch.sources_BT` are below it.
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

    Raises:
      UserError: a context that the MoE layers cannot use, or rows that their groups do not divide.
    """
    config, layout = model.config, model.layout
    # Looked up while split over the width, the rows could only reach their place on the batch axes
    # by a replication of all of them; so each row of the table is whole first.
    embed_VD = constrain(params["embed_VD"], context.mesh, ("vocab", None))
    trunk = _merge_trunk(model, params | {"embed_VD": embed_VD})
    rope = rope_tables(positions_BT, config.head_dim, config.rope_theta, model.dtype)
    segments = segments_BT if config.confine_attention else None
    shared = (rope, segments, context)

    with jax.named_scope("embedding"):
        x = constrain(trunk.embed(tokens_BT), context.mesh, ROWS)
    auxes: list[MoEAux] = []
    moe_before = list(itertools.accumulate(map(config.is_moe, range(layout.num_layers)), initial=0))

    # One jitted function for all blocks of a kind: it is traced, differentiated and lowered once.
    # Where attention has to know its layer, each block is a kind of its own.
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


def _block(model: ModelDef, layer: int, *, scanned: bool):
    """Pure function of block `layer` under the remat policy.

    `index` is the layer's number as an array: in a scan the graph definition is that of the
    first repeat.
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
