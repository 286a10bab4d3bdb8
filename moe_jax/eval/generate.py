"""Generates a few texts by greedy or temperature sampling, without dropping tokens.

B rows, T positions, D model width, V vocabulary.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax.eval.heldout import never_dropping
from moe_jax.model.define import ModelDef, Params
from moe_jax.model.forward import forward, head_weight
from moe_jax.moe.noise import row_keys
from moe_jax.moe.types import MoEContext
from moe_jax.parallel.rules import constrain


def make_sampler(
    model: ModelDef, mesh: Mesh, *, seed: int, temperature: float, vocab_size: int
) -> Callable[[Params, Mapping[str, jax.Array], jax.Array, jax.Array], jax.Array]:
    """Make the function that fills rows with generated tokens after a prompt.

    Each generated token costs a forward pass over all T positions, which is fast enough for a few
    samples.

    Args:
      model, mesh: the model to sample from; B must be a multiple of the batch shards.
      seed: of the draws.
      temperature: of the softmax; 0: take the most likely token.
      vocab_size: ids >= this (padding of the vocabulary) are never drawn.

    Returns:
      (params, router state, tokens_BT, prompt length) -> tokens_BT.
    """
    model = never_dropping(model)

    def sample(
        params: Params, router: Mapping[str, jax.Array], tokens_BT: jax.Array, prompt: jax.Array
    ) -> jax.Array:
        B, T = tokens_BT.shape
        positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        ones_BT = jnp.ones((B, T), jnp.int32)
        keys_B = row_keys(jax.random.key(seed), jnp.arange(B))
        head_DV = head_weight(model, params)

        def one(t, tokens_BT):
            context = MoEContext(
                tokens_BT,
                ones_BT > 0,
                keys_B,
                mesh,
                train=False,
                group_rows=1,
                router_state=router,
            )
            x_BTD, _ = forward(model, params, tokens_BT, positions_BT, ones_BT, context)
            x_BD = jax.lax.dynamic_index_in_dim(x_BTD, t - 1, axis=1, keepdims=False)
            logits_BV = x_BD.astype(jnp.float32) @ head_DV.astype(jnp.float32)
            logits_BV = jnp.where(jnp.arange(logits_BV.shape[1]) < vocab_size, logits_BV, -jnp.inf)
            draws_B = jax.vmap(lambda key: jax.random.fold_in(key, t))(keys_B)
            drawn_B = jax.vmap(_draw)(draws_B, logits_BV).astype(jnp.int32)
            return jax.lax.dynamic_update_slice_in_dim(tokens_BT, drawn_B[:, None], t, axis=1)

        tokens_BT = constrain(tokens_BT, mesh, ("batch", None))
        return jax.lax.fori_loop(prompt, T, one, tokens_BT)

    def _draw(key, logits_V):
        if temperature == 0:
            return jnp.argmax(logits_V)
        return jax.random.categorical(key, logits_V / temperature)

    return sample
