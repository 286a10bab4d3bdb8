"""The decoder-only Transformer as one module: who owns which parameter.

Training runs it through forward.py, on the pure trees into which define.py splits it once.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moe_jax.model.block import Block
from moe_jax.model.config import ModelConfig
from moe_jax.moe.components import refuse_lookahead
from moe_jax.nn.norms import RMSNorm
from moe_jax.nn.params import fan_in, param, param_dtype, scoped, truncated_normal


class Trunk(nnx.Module):
    """Embedding, last norm, and an output head unless it is tied to the embedding."""

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs):
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
        """Rows of the embedding table, in the compute dtype.

        Looked up before they are cast, so that the gradients of a token's many places are added in
        float32.  In bfloat16 a frequent token's sum stops growing (measured on an H200, 16384
        tokens of text: off by half), and it is 140 times slower there (31 ms against 0.22).
        """
        return self.embed_VD[...][tokens_BT].astype(self.dtype)

    def head(self) -> Float[Array, "D V"]:
        """The output projection."""
        return jnp.transpose(self.embed_VD[...]) if self.head_DV is None else self.head_DV[...]


class Transformer(Trunk):
    """A trunk and L blocks.

    Every initial value depends only on the seed of `rngs`, the layer and the parameter's name.
    `config.vocab_size` must be resolved (above 0).
    """

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs):
        if config.vocab_size < 1:
            raise ValueError("model.vocab_size is not resolved: take it from the tokenizer")
        if not config.dense:
            refuse_lookahead(config.moe)
        super().__init__(config, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            make_block(config, layer, layer, dtype=dtype, rngs=rngs)
            for layer in range(config.num_layers)
        )


def make_block(
    config: ModelConfig, layer: int, number: int | jax.Array, *, dtype: Any, rngs: nnx.Rngs
) -> Block:
    """A block of the kind of `layer` with the initial values of layer `number`.

    `rngs` are the Transformer's.
    """
    own = scoped(scoped(rngs, "blocks"), number)
    return Block(config, layer=layer, dtype=dtype, rngs=own)
