"""Noise drawn from a key per row, so it does not depend on the device or the other rows.

Axes: B rows, G routing groups, R rows per group.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

# The uses of randomness in an MoE layer; each number is folded into the row key.
JITTER, SECOND_EXPERT, NOISY_LOGITS, EXPERT_DROPOUT = range(4)


def row_keys(key: jax.Array, row_B: Int[Array, "B"]) -> jax.Array:
    """The key of each row, `fold_in(key, row)`: [B]."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(row_B)


def row_uniform(keys_GR: jax.Array, purpose: int, shape: tuple[int, ...], dtype) -> jax.Array:
    """Draw uniform [0, 1) noise of `shape` per row, joined per group: [G, R*shape[0], ...]."""
    return _row_noise(jax.random.uniform, keys_GR, purpose, shape, dtype)


def row_normal(keys_GR: jax.Array, purpose: int, shape: tuple[int, ...], dtype) -> jax.Array:
    """Draw standard normal noise of `shape` per row, joined per group: [G, R*shape[0], ...]."""
    return _row_noise(jax.random.normal, keys_GR, purpose, shape, dtype)


def _row_noise(distribution, keys_GR, purpose: int, shape: tuple[int, ...], dtype) -> jax.Array:
    """Draw from each row's own key, so its noise does not depend on device or microbatch."""
    G, R = keys_GR.shape

    def draw(key):
        # Always in float32: drawing in a different dtype would give different noise.
        return distribution(jax.random.fold_in(key, purpose), shape, jnp.float32)

    noise = jax.vmap(jax.vmap(draw))(keys_GR).astype(dtype)
    return noise.reshape(G, R * shape[0], *shape[1:])
