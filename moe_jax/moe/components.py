"""From a config to the router and the dispatch path that it names."""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.errors import UserError
from moe_jax.moe.config import MoEConfig
from moe_jax.moe.dispatch import DISPATCH
from moe_jax.moe.routers import ROUTERS
from moe_jax.moe.types import Dispatch, Router
from moe_jax.registry import build


def make_router(config: MoEConfig) -> Router:
    """The configured router; raises UserError for an unknown name or knob."""
    return build(ROUTERS, config.router, config, "model.moe.router")


def make_dispatch(config: MoEConfig) -> Dispatch:
    """The configured dispatch path; raises UserError for an unknown name or knob."""
    return build(DISPATCH, config.dispatch, config, "model.moe.dispatch")


def first_router_state(config: MoEConfig, layers: int, dtype: Any) -> dict[str, jax.Array]:
    """What the routers of `layers` MoE layers carry before the first step: [layers, ...]."""
    return {
        name: jnp.full((layers, *spec.shape), spec.initial, dtype)
        for name, spec in make_router(config).state_specs(config.num_experts).items()
    }


def refuse_lookahead(config: MoEConfig) -> None:
    """Raises UserError for routing in which later tokens decide about earlier ones.

    A layer alone accepts it; a next-token model would learn to read the future from it.
    """
    if not make_router(config).causal:
        raise UserError(
            f"model.moe.router {config.router} lets later tokens decide about the experts of "
            f"earlier ones, so a next-token model would see the future: use a router whose tokens "
            f"choose for themselves, such as top_k."
        )
    if config.priority == "batch":
        raise UserError(
            "model.moe.priority batch lets later tokens take the slots of earlier ones, so a "
            "next-token model would see the future: use priority token."
        )
