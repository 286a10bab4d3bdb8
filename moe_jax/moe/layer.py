"""The mixture-of-experts layer: owns the parameters, calls the router and the dispatch path."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_jax.moe.accounting import account
from moe_jax.moe.components import make_dispatch, make_router
from moe_jax.moe.config import MoEConfig
from moe_jax.moe.experts import Experts
from moe_jax.moe.noise import EXPERT_DROPOUT, row_uniform
from moe_jax.moe.types import (
    Choice,
    DispatchIn,
    ExpertChoice,
    MoEAux,
    MoEContext,
    RouterIn,
    TokenChoice,
)
from moe_jax.nn.ffn import DenseFFN
from moe_jax.nn.params import fan_in, param, param_dtype, residual_fan_in, scoped, truncated_normal
from moe_jax.ops.expert_activation import ACTIVATE


class MoE(nnx.Module):
    """E routed experts, and optionally always-on shared ones, in place of a dense FFN."""

    def __init__(
        self,
        config: MoEConfig,
        width: int,
        *,
        activation: str = "swiglu",
        depth: int = 1,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        D, E, F, own = width, config.num_experts, config.expert_width, param_dtype(dtype)
        U = ACTIVATE[activation][0]
        self.router = make_router(config)
        self.dispatch = make_dispatch(config)
        self.activation, self.matmul = activation, config.matmul
        self.expert_dropout = config.expert_dropout
        self.freeze_router = config.freeze_router
        self.router_names = []
        for name, spec in self.router.param_specs(D, E).items():
            init = truncated_normal(spec.std)
            leaf = param(
                rngs, f"router_{name}", spec.shape, spec.logical_axes, init, own, group="router"
            )
            setattr(self, f"router_{name}", leaf)
            self.router_names.append(name)
        # Fan-in is one expert's: the stack of E is not an input dimension.
        into = ("experts", "expert_embed", None, "expert_mlp")
        out = ("experts", "expert_mlp", "expert_embed")
        expert = functools.partial(param, rngs, dtype=own, group="experts", narrow=True)
        self.w_in_EDUF = expert("w_in", (E, D, U, F), into, fan_in(D))
        self.w_out_EFD = expert("w_out", (E, F, D), out, residual_fan_in(F, depth))
        self.shared = (
            DenseFFN(
                width,
                config.shared_experts * F,
                activation=activation,
                depth=depth,
                dtype=dtype,
                rngs=scoped(rngs, "shared"),
            )
            if config.shared_experts
            else None
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
