"""Builds the router and the dispatch path that a config names."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moe_jax.errors import UserError
from moe_jax.moe.config import MoEConfig
from moe_jax.moe.dispatch import DISPATCH
from moe_jax.moe.dispatch.dropless import Dropless
from moe_jax.moe.routers import ROUTERS
from moe_jax.moe.types import Dispatch, Router
from moe_jax.registry import build_component


@dataclasses.dataclass(frozen=True)
class Components:
    """The parts of MoE layers that a config chooses by name."""

    router: Router  # from `make_router`, or the caller's own
    dispatch: Dispatch  # from `make_dispatch`, or the caller's own

    def without_drops(self) -> "Components":
        """The same router with a dispatch path that drops no assignment.

        Returns:
          Components with dropless dispatch; these components if their path drops nothing.
        """
        return dataclasses.replace(self, dispatch=Dropless()) if self.dispatch.drops else self


def make_components(
    config: MoEConfig, router: Router | None = None, dispatch: Dispatch | None = None
) -> Components:
    """The router and the dispatch path: those given, else those that the config names.

    Raises:
      UserError: an unknown name or knob, or a matmul that the path does not support.
    """
    router = make_router(config) if router is None else router
    dispatch = make_dispatch(config) if dispatch is None else dispatch
    if config.matmul == "float8" and not dispatch.grouped:
        raise UserError(
            f"model.moe.matmul is float8: it needs rows sorted by expert, and dispatch "
            f"{title_of(dispatch, DISPATCH, config.dispatch)} does not sort them. "
            f"Set model.moe.dispatch dropless."
        )
    return Components(router, dispatch)


def title_of(component: Router | Dispatch, table: Mapping[str, type], name: str) -> str:
    """The config's `name` of `component` if `table` maps it to that class, else the class name.

    They differ if the caller passed an object instead of using the one that the config names.
    """
    kind = type(component)
    return name if table.get(name) is kind else kind.__name__


def make_router(config: MoEConfig) -> Router:
    """Build the router that `config.router` names in ROUTERS.

    Args:
      config: gives the fields that it shares with the router's dataclass; the others come from
        `config.options[config.router]`.

    Returns:
      A frozen dataclass that holds the router's knobs.

    Raises:
      UserError: an unknown name or knob.
    """
    return build_component(ROUTERS, config.router, config, "model.moe.router")


def make_dispatch(config: MoEConfig) -> Dispatch:
    """Build the dispatch path that `config.dispatch` names in DISPATCH.

    Args:
      config: gives the fields that it shares with the path's dataclass; the others come from
        `config.options[config.dispatch]`.

    Returns:
      A frozen dataclass that holds the path's knobs.

    Raises:
      UserError: an unknown name or knob.
    """
    return build_component(DISPATCH, config.dispatch, config, "model.moe.dispatch")


def init_router_state(
    config: MoEConfig, layers: int | None = None, *, dtype: DTypeLike = jnp.float32
) -> dict[str, jax.Array]:
    """The initial state of the config's router; empty for most routers.

    Args:
      config: names the router.
      layers: number of MoE layers, the leading axis of each array; None: one layer, without it.
      dtype: of the arrays.

    Returns:
      Name -> [layers, ...].

    Raises:
      UserError: an unknown router or knob.
    """
    return router_state(make_router(config), config.num_experts, layers, dtype)


def router_state(
    router: Router, num_experts: int, layers: int | None, dtype: DTypeLike
) -> dict[str, jax.Array]:
    """See `init_router_state`."""
    leading = () if layers is None else (layers,)
    return {
        name: jnp.full((*leading, *spec.shape), spec.initial, dtype)
        for name, spec in router.state_specs(num_experts).items()
    }


def refuse_lookahead(components: Components, config: MoEConfig) -> None:
    """Raise UserError for routing in which later tokens affect the experts of earlier ones.

    A layer alone accepts it.  A next-token model would learn to read the future from it.
    """
    router = components.router
    if not router.causal:
        raise UserError(
            f"model.moe.router is {title_of(router, ROUTERS, config.router)}: later tokens affect "
            f"the experts of earlier ones, so a next-token model would see the future. Set a "
            f"causal router, such as top_k."
        )
    if getattr(components.dispatch, "priority", config.priority) == "batch":
        raise UserError(
            "model.moe.priority is batch: later tokens can take the slots of earlier ones, so a "
            "next-token model would see the future. Set priority token."
        )
