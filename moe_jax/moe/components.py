"""From a config to the router and the dispatch path that it names: built once, then handed on."""

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
from moe_jax.registry import build


@dataclasses.dataclass(frozen=True)
class Components:
    """The parts of a mixture's layers that a config chooses by name."""

    router: Router  # of `make_router`, or one that a program made
    dispatch: Dispatch  # of `make_dispatch`, or one that a program made

    def without_drops(self) -> "Components":
        """The same router behind a dispatch path that drops nothing.

        Returns:
          These components where the path drops nothing already.
        """
        return dataclasses.replace(self, dispatch=Dropless()) if self.dispatch.drops else self


def make_components(
    config: MoEConfig, router: Router | None = None, dispatch: Dispatch | None = None
) -> Components:
    """The router and the dispatch path: those given, else those that the config names.

    Raises:
      UserError: an unknown name or knob, or a knob of the experts that the path does not take.
    """
    router = make_router(config) if router is None else router
    dispatch = make_dispatch(config) if dispatch is None else dispatch
    if config.matmul == "float8" and not dispatch.grouped:
        raise UserError(
            f"model.moe.matmul float8 multiplies sorted rows, which dispatch "
            f"{title_of(dispatch, DISPATCH, config.dispatch)} does not: use dispatch dropless."
        )
    return Components(router, dispatch)


def title_of(component: Router | Dispatch, table: Mapping[str, type], name: str) -> str:
    """The `name` in a config if it names `component` in `table`, else that of its class.

    An object may have taken the place of what the config names.
    """
    kind = type(component)
    return name if table.get(name) is kind else kind.__name__


def make_router(config: MoEConfig) -> Router:
    """The router that `config.router` names in ROUTERS.

    Args:
      config: fields that it shares with the router's dataclass fill those; the others come from
        `config.options[config.router]`.

    Returns:
      A frozen dataclass of its own knobs.

    Raises:
      UserError: an unknown name or knob.
    """
    return build(ROUTERS, config.router, config, "model.moe.router")


def make_dispatch(config: MoEConfig) -> Dispatch:
    """The dispatch path that `config.dispatch` names in DISPATCH.

    Args:
      config: fields that it shares with the path's dataclass fill those; the others come from
        `config.options[config.dispatch]`.

    Returns:
      A frozen dataclass of its own knobs.

    Raises:
      UserError: an unknown name or knob.
    """
    return build(DISPATCH, config.dispatch, config, "model.moe.dispatch")


def init_router_state(
    config: MoEConfig, layers: int | None = None, *, dtype: DTypeLike = jnp.float32
) -> dict[str, jax.Array]:
    """What the config's router carries before the first step; empty for most routers.

    Args:
      config: names the router.
      layers: MoE layers, a leading axis of each array; None: one layer, without that axis.
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
    """Raises UserError for routing in which later tokens decide about earlier ones.

    A layer alone accepts it; a next-token model would learn to read the future from it.
    """
    router = components.router
    if not router.causal:
        raise UserError(
            f"model.moe.router {title_of(router, ROUTERS, config.router)} lets later tokens decide "
            f"about the experts of earlier ones, so a next-token model would see the future: use "
            f"a router whose tokens choose for themselves, such as top_k."
        )
    if getattr(components.dispatch, "priority", config.priority) == "batch":
        raise UserError(
            "model.moe.priority batch lets later tokens take the slots of earlier ones, so a "
            "next-token model would see the future: use priority token."
        )
