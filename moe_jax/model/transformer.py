"""The decoder-only Transformer as one Flax module, which owns all parameters.

define.py splits it once into pure trees, and training runs forward.py on these.  B rows, T
positions, D model width, V vocabulary, L layers.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_jax.errors import UserError
from moe_jax.model.block import Block
from moe_jax.model.config import ModelConfig
from moe_jax.model.rope import rope_tables
from moe_jax.moe.call import (
    INTEGERS,
    LayerNeeds,
    call_context,
    check_array,
    check_call,
    check_tokens,
)
from moe_jax.moe.components import Components, make_components, refuse_lookahead
from moe_jax.moe.layer import MoE
from moe_jax.moe.types import MoEAux, MoEContext
from moe_jax.nn.norms import RMSNorm
from moe_jax.nn.params import fan_in, fresh, param, param_dtype, scoped, truncated_normal


class Trunk(nnx.Module):
    """The embedding, the last norm, and an output head unless it is tied to the embedding."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        V, D, own = config.vocab_size, config.width, param_dtype(dtype)
        # A tied table is also the head, which sums D products into a logit.
        embed_init = truncated_normal(1 / math.sqrt(D))
        self.dtype = dtype
        self.embed_VD = param(
            rngs, "embed", (V, D), ("vocab", "embed"), embed_init, own, group="embedding"
        )
        self.norm = RMSNorm(D, "norm", eps=config.norm_eps, dtype=dtype, rngs=rngs)
        self.head_DV = (
            None
            if config.tied_head
            else param(rngs, "head", (D, V), ("embed", "vocab"), fan_in(D), own, group="head")
        )

    def embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Look up rows of the embedding table, in the compute dtype.

        The cast comes after the lookup, so that gradients of all occurrences of a token are added
        in float32.  In bfloat16 the sum of a frequent token stops growing (measured on an H200 with
        16384 tokens of text: off by half), and the sum is 140 times slower (31 ms against 0.22).
        """
        return self.embed_VD[...][tokens_BT].astype(self.dtype)

    def head(self) -> Float[Array, "D V"]:
        """The output projection."""
        return jnp.transpose(self.embed_VD[...]) if self.head_DV is None else self.head_DV[...]


class ModelOutput(NamedTuple):
    """The result of `Transformer.apply`."""

    logits: Float[Array, "B T V"]  # float32 or wider
    hidden: Float[Array, "B T D"]  # after the last norm
    aux: MoEAux | None  # of the MoE layers, stacked in layer order; None: dense model


class Transformer(Trunk):
    """The model from tokens to logits: a trunk and L unrolled blocks.

    A run uses `forward` instead, which can scan layers; its results are equal up to rounding.

    Every initial value depends only on the seed of `rngs`, the layer and the parameter's name.

    Args:
      config: the model's shape; `vocab_size` must be above 0.
      components: router and dispatch path of its MoE layers; None: those that `config.moe` names.
      dtype: compute dtype; parameters are float32 or wider.
      rngs: draws the initial values (stream `params`).

    Attributes:
      components: router and dispatch path of its MoE layers; None: dense model.
      deterministic: True: calls evaluate.  True at first; `model.train()` sets False and
        `model.eval()` sets True.

    Raises:
      UserError: `vocab_size` is 0, or the router is not causal.

    Reference: RMSNorm, arXiv 1910.07467; RoPE, arXiv 2104.09864; SwiGLU, arXiv 2002.05202.
    """

    def __init__(
        self,
        config: ModelConfig,
        components: Components | None = None,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if config.vocab_size < 1:
            raise UserError(
                "ModelConfig.vocab_size is 0. Set it to the vocabulary size of the tokenizer."
            )
        self.components = None if config.dense else components or make_components(config.moe)
        if self.components is not None:
            refuse_lookahead(self.components, config.moe)
        rngs = fresh(rngs)
        super().__init__(config, dtype=dtype, rngs=rngs)
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        self.confine_attention = config.confine_attention
        self.deterministic = True
        self.blocks = nnx.List(
            make_block(config, self.components, layer, layer, dtype=dtype, rngs=rngs)
            for layer in range(config.num_layers)
        )

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        positions_BT: Int[Array, "B T"] | None = None,
        segments_BT: Int[Array, "B T"] | None = None,
        router_state: Mapping[str, jax.Array] | None = None,
        key: jax.Array | None = None,
        mesh: Mesh | None = None,
        deterministic: bool | None = None,
    ) -> Float[Array, "B T V"]:
        """Compute the logits of the next token at each position.

        Args:
          tokens_BT: ids below the vocabulary size.
          positions_BT: for RoPE; None: 0 to T - 1 in each row.
          segments_BT: document of each token, 0 for padding; None: one document per row.
          router_state, key, mesh, deterministic: as in `make_context`, None included.

        Returns:
          Logits [B, T, V] in float32 or wider.

        Raises:
          UserError: a shape, mesh, key, state or number of rows does not fit.
        """
        context = self.make_context(
            tokens_BT,
            segments_BT=segments_BT,
            router_state=router_state,
            key=key,
            mesh=mesh,
            deterministic=deterministic,
        )
        return self.apply(
            tokens_BT, context, positions_BT=positions_BT, segments_BT=segments_BT
        ).logits

    def make_context(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        segments_BT: Int[Array, "B T"] | None = None,
        router_state: Mapping[str, jax.Array] | None = None,
        key: jax.Array | None = None,
        mesh: Mesh | None = None,
        deterministic: bool | None = None,
    ) -> MoEContext:
        """Make the context that `apply` takes in addition to the tokens.

        Args:
          tokens_BT: ids [B, T], as in a call.
          segments_BT: document of each token, 0 for padding; None: one document per row.
          router_state: `init_router_state(config.moe, config.moe_layers)`; None: for routers
            without state.
          key: PRNG key, for routers that sample and for dropout in training; None: for calls that
            draw nothing.
          mesh: from `make_mesh`; None as in `MoE`.
          deterministic: True: no noise, no dropout, `eval_capacity_factor`; None: the module's
            attribute.

        Returns:
          The context of a call with these arguments.

        Raises:
          UserError: a shape, key or state does not fit.
        """
        check_tokens("Transformer got tokens", tokens_BT, (None, None), INTEGERS)
        if segments_BT is not None:
            check_array("segments_BT", segments_BT, tokens_BT.shape, INTEGERS)
        return call_context(
            tokens_BT,
            self._needs(),
            mask_BT=None if segments_BT is None else segments_BT > 0,
            token_ids_BT=tokens_BT,
            key=key,
            router_state=router_state,
            mesh=mesh,
            deterministic=self.deterministic if deterministic is None else deterministic,
        )

    def _needs(self) -> LayerNeeds | None:
        """The needs of the MoE layers for their shared context; None for a dense model."""
        layers = [block.ffn for block in self.blocks if isinstance(block.ffn, MoE)]
        return layers[0].needs(len(layers)) if layers else None

    def apply(
        self,
        tokens_BT: Int[Array, "B T"],
        context: MoEContext,
        *,
        positions_BT: Int[Array, "B T"] | None = None,
        segments_BT: Int[Array, "B T"] | None = None,
    ) -> ModelOutput:
        """Compute the logits and MoEAux, the statistics of the MoE layers.

        Args:
          tokens_BT, positions_BT, segments_BT: as in a call, None included.
          context: mesh, mask, keys and router state (`make_context`); `row_keys_B` are folded with
            the layer here.

        Returns:
          Logits, hidden states after the last norm, and MoEAux with a leading axis over MoE layers.

        Raises:
          UserError: as a call.
        """
        check_tokens("Transformer got tokens", tokens_BT, (None, None), INTEGERS)
        B, T = tokens_BT.shape
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        check_array("positions_BT", positions_BT, (B, T), INTEGERS)
        if segments_BT is not None:
            check_array("segments_BT", segments_BT, (B, T), INTEGERS)
        check_call(tokens_BT, context, self._needs())
        rope = rope_tables(positions_BT, self.head_dim, self.rope_theta, self.dtype)
        segments_BT = segments_BT if self.confine_attention else None
        x_BTD, auxes = self.embed(tokens_BT), []
        for layer, block in enumerate(self.blocks):
            keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(context.row_keys_B, layer)
            state = {}
            if isinstance(block.ffn, MoE):
                state = {name: leaf[len(auxes)] for name, leaf in context.router_state.items()}
            own = dataclasses.replace(context, row_keys_B=keys_B, router_state=state)
            x_BTD, aux = block(x_BTD, rope, segments_BT, own)
            auxes += [] if aux is None else [aux]
        hidden_BTD = self.norm(x_BTD)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        logits_BTV = hidden_BTD.astype(wide) @ self.head().astype(wide)
        joined = jax.tree.map(lambda *leaves: jnp.stack(leaves), *auxes) if auxes else None
        return ModelOutput(logits_BTV, hidden_BTD, joined)


def make_block(
    config: ModelConfig,
    components: Components | None,
    layer: int,
    number: int | jax.Array,
    *,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> Block:
    """Make a block of the kind of `layer` with the initial values of layer `number`.

    Args:
      config: the model's shape.
      components: of the MoE layers; None in a dense model.
      layer: decides whether the block is dense or MoE.
      number: layer whose initial values are drawn; an array under jit.
      dtype: compute dtype.
      rngs: those of the Transformer.

    Returns:
      The block.
    """
    own = scoped(scoped(rngs, "blocks"), number)
    return Block(config, components, layer=layer, dtype=dtype, rngs=own)
