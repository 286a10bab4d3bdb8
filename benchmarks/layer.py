"""Makes one MoE layer and its arguments, for the benchmarks of layers.

B rows, T positions, D width, F expert width, E experts, K experts per token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.moe.config import MoEConfig
from moe_jax.moe.layer import MoE
from moe_jax.moe.types import MoEContext
from moe_jax.parallel.mesh import MeshConfig, make_mesh


class Shape(NamedTuple):
    """The sizes of a layer and of its batch."""

    rows: int  # B
    length: int  # T
    width: int  # D
    expert_width: int  # F
    experts: int  # E
    top_k: int  # K

    @property
    def flops(self) -> int:
        """The FLOPs, forward and backward, of the matmuls of K experts per token and the router."""
        experts = 3 * self.width * self.expert_width * self.top_k
        return 6 * self.rows * self.length * (experts + self.width * self.experts)


def layer(shape: Shape, dispatch: str) -> tuple[Callable, Any]:
    """Make (compiled (weights, x, dy) -> ((loss, stats), gradients), its arguments).

    The experts' weights and their gradients are in bfloat16.
    """
    B, T, D, F, E, K = shape
    moe = MoEConfig(num_experts=E, expert_width=F, top_k=K, dispatch=dispatch)
    params: Any
    graph, params = nnx.split(MoE(moe, D, dtype=jnp.bfloat16, rngs=nnx.Rngs(params=0)))
    names = ("w_in_EDUF", "w_out_EFD")
    weights = {name: params[name][...].astype(jnp.bfloat16) for name in names}
    weights["router_kernel"] = params["router_kernel"][...]
    context = MoEContext(
        token_ids_BT=jnp.zeros((B, T), jnp.int32),
        mask_BT=jnp.ones((B, T), bool),
        row_keys_B=jax.random.split(jax.random.key(0), B),
        mesh=make_mesh(MeshConfig(data=1), jax.devices()[:1]),
        group_rows=1,
        train=True,
    )

    def loss(weights, x_BTD, dy_BTD):
        module: Any = nnx.merge(graph, weights)
        y_BTD, aux = module(x_BTD, context)
        return (y_BTD * dy_BTD).astype(jnp.float32).sum() + aux.router.balance.value(), aux.stats

    keys = jax.random.split(jax.random.key(1))
    x, dy = (jax.random.normal(key, (B, T, D), jnp.bfloat16) for key in keys)
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return step, (weights, x, dy)


def even(shape: Shape, arguments: Any) -> Any:
    """Make tokens whose largest features are K experts in turn, and a router that reads them."""
    B, T, D, _, E, K = shape
    weights, x, dy = arguments
    first = jnp.arange(B * T)[:, None] * K % E
    near = (jnp.arange(E) - first) % E
    x = x.reshape(B * T, D).at[:, :E].set(jnp.where(near < K, 8.0 - near, 0).astype(x.dtype))
    kernel = jnp.zeros((D, E)).at[:E].set(jnp.eye(E))
    return {**weights, "router_kernel": kernel}, x.reshape(dy.shape), dy


LOADS = {"natural": lambda shape, arguments: arguments, "even": even}
