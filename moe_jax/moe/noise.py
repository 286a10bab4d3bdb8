"""Noise that belongs to a row: the same wherever and with whichever rows it is computed."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

# Purposes of an MoE layer's randomness, folded into the row key.
JITTER, SECOND_EXPERT, NOISY_LOGITS, EXPERT_DROPOUT = range(4)


def row_keys(key: jax.Array, row_B: Int[Array, "B"]) -> jax.Array:
    """A key per row, `fold_in(key, row)`: [B]."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(row_B)


def row_uniform(keys_GR: jax.Array, purpose: int, shape: tuple[int, ...], dtype) -> jax.Array:
    """Uniform [0, 1) noise of `shape` for each row, joined inside a group: [G, R*shape[0], ...]."""
    return _row_noise(jax.random.uniform, keys_GR, purpose, shape, dtype)


def row_normal(keys_GR: jax.Array, purpose: int, shape: tuple[int, ...], dtype) -> jax.Array:
    """Standard normal noise of `shape` for each row, joined inside a group."""
    return _row_noise(jax.random.normal, keys_GR, purpose, shape, dtype)


def _row_noise(distribution, keys_GR, purpose: int, shape: tuple[int, ...], dtype) -> jax.Array:
    """Each row draws from its own key: its noise depends on no device and no microbatch."""
    G, R = keys_GR.shape

    def draw(key):
        # float32 whatever `dtype`: another width would draw other noise.
        return distribution(jax.random.fold_in(key, purpose), shape, jnp.float32)

    noise = jax.vmap(jax.vmap(draw))(keys_GR).astype(dtype)
    return noise.reshape(G, R * shape[0], *shape[1:])
