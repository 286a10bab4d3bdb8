"""The mixture-of-experts layer: owns the parameters, calls the router and the dispatch path."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moe_jax.errors import UserError
from moe_jax.model.config import ModelConfig
from moe_jax.moe.accounting import account
from moe_jax.moe.config import MoEConfig
from moe_jax.moe.dispatch import DISPATCH
from moe_jax.moe.experts import Experts
from moe_jax.moe.noise import EXPERT_DROPOUT, row_uniform
from moe_jax.moe.routers import ROUTERS
from moe_jax.moe.types import (
    Choice,
    Dispatch,
    DispatchIn,
    ExpertChoice,
    MoEAux,
    MoEContext,
    Router,
    RouterIn,
    TokenChoice,
)
from moe_jax.nn.ffn import DenseFFN
from moe_jax.nn.params import fan_in, param, param_dtype, residual_fan_in, scoped, truncated_normal
from moe_jax.ops.expert_activation import ACTIVATE
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


class MoE(nnx.Module):
    """E routed experts, and optionally always-on shared ones, in place of a dense FFN."""

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs):
        moe, D = config.moe, config.width
        E, F, own = moe.num_experts, moe.expert_width, param_dtype(dtype)
        U = ACTIVATE[config.activation][0]
        self.router = make_router(moe)
        self.dispatch = make_dispatch(moe)
        self.activation, self.matmul = config.activation, moe.matmul
        self.expert_dropout = moe.expert_dropout
        self.freeze_router = moe.freeze_router
        self.router_names = []
        for name, spec in self.router.param_specs(D, E).items():
            init = truncated_normal(spec.std)
            leaf = param(rngs, f"router_{name}", spec.shape, spec.logical_axes, init, own)
            setattr(self, f"router_{name}", leaf)
            self.router_names.append(name)
        # Fan-in is one expert's: the stack of E is not an input dimension.
        into = ("experts", "expert_embed", None, "expert_mlp")
        out = ("experts", "expert_mlp", "expert_embed")
        out_init = residual_fan_in(F, config.num_layers)
        self.w_in_EDUF = param(rngs, "w_in", (E, D, U, F), into, fan_in(D), own, narrow=True)
        self.w_out_EFD = param(rngs, "w_out", (E, F, D), out, out_init, own, narrow=True)
        wide = dataclasses.replace(config, ffn_width=moe.shared_experts * F or F)
        self.shared = (
            DenseFFN(wide, dtype=dtype, rngs=scoped(rngs, "shared")) if moe.shared_experts else None
        )

    def __call__(
        self, x_BTD: Float[Array, "B T D"], context: MoEContext
    ) -> tuple[Float[Array, "B T D"], MoEAux]:
        """Output of the experts for every token, and what happened.

        Routed experts give padding zero.
        """
        B, T, D = x_BTD.shape
        R = context.group_rows
        G = B // R
        x_GSD = x_BTD.reshape(G, R * T, D)
        mask_GS = context.mask_BT.reshape(G, R * T)
        inputs = RouterIn(
            x_GSD=x_GSD,
            token_ids_GS=context.token_ids_BT.reshape(G, R * T),
            mask_GS=mask_GS,
            keys_GR=context.row_keys_B.reshape(G, R),
            train=context.train,
        )
        params = {name: getattr(self, f"router_{name}")[...] for name in self.router_names}
        if self.freeze_router:
            params = jax.lax.stop_gradient(params)
        with jax.named_scope("router"):
            choice, aux = self.router.route(inputs, params, context.router_state)
            by_token, slots = _by_token(choice, R * T)
        experts = Experts(
            self.w_in_EDUF[...].astype(x_BTD.dtype),
            self.w_out_EFD[...].astype(x_BTD.dtype),
            self.activation,
            self.matmul,
        )
        with jax.named_scope("dispatch"):
            y_GSD, kept_GSK = self.dispatch(
                x_GSD, by_token, experts, DispatchIn(mask_GS, R, context.train, context.mesh, slots)
            )
        if context.train and self.expert_dropout:
            y_GSD = _dropout(y_GSD, inputs.keys_GR, self.expert_dropout)
        y_BTD = y_GSD.reshape(B, T, D)
        if self.shared is not None:
            with jax.named_scope("ffn"):
                y_BTD = y_BTD + self.shared(x_BTD)
        with jax.named_scope("ledger"):
            stats, ledger = account(
                choice, by_token, kept_GSK, self.dispatch.drop_cause, experts.num_experts, context
            )
        return y_BTD, MoEAux(aux, stats, ledger)


def _by_token(choice: Choice, tokens: int) -> tuple[TokenChoice, int | None]:
    """The choice as dispatch paths take it, and the slots an expert fills where it chose itself."""
    if isinstance(choice, ExpertChoice):
        return choice.by_token(tokens), choice.ids_GEC.shape[2]
    return choice, None


def _dropout(y_GSD: jax.Array, keys_GR: jax.Array, rate: float) -> jax.Array:
    """Each number is zero with probability `rate`, and larger by 1 / (1 - rate) otherwise."""
    positions = y_GSD.shape[1] // keys_GR.shape[1]
    noise_GSD = row_uniform(keys_GR, EXPERT_DROPOUT, (positions, y_GSD.shape[2]), jnp.float32)
    return jnp.where(noise_GSD < rate, 0, y_GSD / (1 - rate)).astype(y_GSD.dtype)
