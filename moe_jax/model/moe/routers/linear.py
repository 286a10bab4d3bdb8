"""What the linear routers share: one matrix, full-precision logits, optional input jitter."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moe_jax.model.moe.balance import balance_loss, router_aux
from moe_jax.model.moe.types import ParamSpec, RouterAux, RouterIn
from moe_jax.model.remat import ROUTER_LOGITS

# Purposes of a router's randomness, folded into the row key.
JITTER, SECOND_EXPERT = 0, 1


def linear_params(width: int, num_experts: int) -> dict[str, ParamSpec]:
    """One [D, E] matrix; std 0.02 as in OLMoE and Mixtral's released configurations."""
    return {"kernel": ParamSpec((width, num_experts), ("embed", "router_experts"), 0.02)}


def row_uniform(keys_GR: jax.Array, purpose: int, shape: tuple[int, ...], dtype) -> jax.Array:
    """Uniform [0, 1) noise of `shape` for each row, joined inside a group: [G, R*shape[0], ...].

    Each row draws from its own key, so the noise of a row does not depend on which device or
    microbatch holds it.
    """
    G, R = keys_GR.shape

    def draw(key):
        return jax.random.uniform(jax.random.fold_in(key, purpose), shape, dtype)

    noise = jax.vmap(jax.vmap(draw))(keys_GR)
    return noise.reshape(G, R * shape[0], *shape[1:])


def linear_logits(
    inputs: RouterIn, kernel_DE: Float[Array, "D E"], jitter: float
) -> Float[Array, "G S E"]:
    """Router logits in at least float32, with multiplicative input jitter U(1-j, 1+j) in training.

    `precision=HIGHEST`: the default float32 product is TF32 on Hopper and bfloat16 on TPU, and a
    bfloat16 router changes the top-2 set of about 1% of tokens.
    """
    dtype = jnp.promote_types(inputs.x_GSD.dtype, jnp.float32)
    x_GSD = inputs.x_GSD.astype(dtype)
    if inputs.train and jitter > 0:
        rows = inputs.keys_GR.shape[1]
        shape = (x_GSD.shape[1] // rows, x_GSD.shape[2])
        noise = row_uniform(inputs.keys_GR, JITTER, shape, dtype)
        x_GSD = x_GSD * (1 + jitter * (2 * noise - 1))
    logits_GSE = jnp.einsum(
        "gsd,de->gse", x_GSD, kernel_DE.astype(dtype), precision=jax.lax.Precision.HIGHEST
    )
    return checkpoint_name(logits_GSE, ROUTER_LOGITS)


def top_choices(
    probs_GSE: Float[Array, "G S E"], choices: int
) -> tuple[Float[Array, "G S K"], Int[Array, "G S K"]]:
    """The K largest probabilities of each token and their experts, largest first.

    Equal ones go to the lower expert, as in `jax.lax.top_k`.  That one is not used because XLA
    does not partition it: on a mesh each device would gather the probabilities of all tokens and
    choose for all of them.
    """
    expert_E = jnp.arange(probs_GSE.shape[-1], dtype=jnp.int32)
    left_GSE = jax.lax.stop_gradient(probs_GSE)
    weights, ids = [], []
    for _ in range(choices):
        is_largest_GSE = left_GSE == left_GSE.max(-1, keepdims=True)
        # The last expert where nothing is equal: a row of NaN keeps an id in range.
        id_GS = jnp.where(is_largest_GSE, expert_E, expert_E[-1]).min(-1)
        chosen_GSE = expert_E == id_GS[..., None]
        weights.append(jnp.where(chosen_GSE, probs_GSE, 0).sum(-1))
        ids.append(id_GS)
        left_GSE = jnp.where(chosen_GSE, -jnp.inf, left_GSE)
    return jnp.stack(weights, -1), jnp.stack(ids, -1)


def linear_aux(
    inputs: RouterIn,
    logits_GSE: Float[Array, "G S E"],
    probs_GSE: Float[Array, "G S E"],
    ids_GSK: Int[Array, "G S K"],
    scope: str,
) -> RouterAux:
    """Balance over the choices in `ids_GSK`, z-loss and entropy."""
    rows = inputs.keys_GR.shape[1]
    balance = balance_loss(probs_GSE, ids_GSK, inputs.mask_GS, scope=scope, rows=rows)
    return router_aux(logits_GSE, probs_GSE, balance, inputs.mask_GS)
