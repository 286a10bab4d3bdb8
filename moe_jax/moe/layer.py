"""The mixture-of-experts layer: owns the parameters, calls the router and the dispatch path.

Axes: B rows, T positions per row, D width, G routing groups, R rows per group, S = R*T tokens per
group, K assignments per token, E experts, F hidden width, U matrices of an expert's first layer.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from moe_jax.moe.accounting import count_outcomes
from moe_jax.moe.call import (
    FLOATS,
    LayerNeeds,
    call_context,
    check_call,
    check_tokens,
    rows_in_group,
)
from moe_jax.moe.components import make_components, title_of
from moe_jax.moe.config import MoEConfig
from moe_jax.moe.dispatch_types import DispatchIn
from moe_jax.moe.experts import Experts
from moe_jax.moe.noise import EXPERT_DROPOUT, row_uniform
from moe_jax.moe.routers import ROUTERS
from moe_jax.moe.types import Dispatch, MoEAux, MoEContext, Router, RouterIn, token_choice
from moe_jax.nn.ffn import DenseFFN
from moe_jax.nn.params import (
    fan_in,
    fresh,
    param,
    param_dtype,
    residual_fan_in,
    scoped,
    truncated_normal,
)
from moe_jax.ops.expert_activation import ACTIVATE
from moe_jax.registry import lookup


class MoE(nnx.Module):
    """E routed experts, and optionally always-on shared ones, in place of a dense FFN.

    Args:
      config: experts, K, router and dispatch path with their knobs; `aux_loss`, not the layer,
        applies the weights of the auxiliary losses.
      width: D, of the tokens.
      activation: of the experts: swiglu or gelu.
      depth: layers of the model, for the 1 / sqrt(2 depth) in the initial output projection.
      router, dispatch: objects to use instead of those that `config` names; None: use those.
      dtype: of the computation; parameters are float32 or wider.
      rngs: draws the initial values (stream `params`).

    Attributes:
      deterministic: True: a call without a context is an evaluation; `model.eval()` sets it.

    Raises:
      UserError: a router, dispatch path or knob that does not exist.

    Reference: Shazeer et al., arXiv 1701.06538; GShard, arXiv 2006.16668; Switch, arXiv 2101.03961.
    """

    def __init__(
        self,
        config: MoEConfig,
        width: int,
        *,
        activation: str = "swiglu",
        depth: int = 1,
        router: Router | None = None,
        dispatch: Dispatch | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        D, E, F, own = width, config.num_experts, config.expert_width, param_dtype(dtype)
        U = lookup(ACTIVATE, activation, "activation")[0]
        rngs = fresh(rngs)
        parts = make_components(config, router, dispatch)
        self.router, self.dispatch = parts.router, parts.dispatch
        self.router_title = title_of(self.router, ROUTERS, config.router)
        self.activation, self.matmul = activation, config.matmul
        self.expert_dropout = config.expert_dropout
        self.freeze_router = config.freeze_router
        self.group_rows = config.group_rows
        self.deterministic = False
        self.router_names = []
        for name, spec in self.router.param_specs(D, E).items():
            init = truncated_normal(spec.std)
            leaf = param(
                rngs, f"router_{name}", spec.shape, spec.logical_axes, init, own, group="router"
            )
            setattr(self, f"router_{name}", leaf)
            self.router_names.append(name)
        # The fan-in is that of one expert: the axis E is not an input dimension.
        scale = config.expert_init_scale
        into = ("experts", "expert_embed", "expert_matrices", "expert_mlp")
        out = ("experts", "expert_mlp", "expert_embed")
        expert = functools.partial(param, rngs, dtype=own, group="experts", compute_dtype_only=True)
        self.w_in_EDUF = expert("w_in", (E, D, U, F), into, fan_in(D, scale))
        self.w_out_EFD = expert("w_out", (E, F, D), out, residual_fan_in(F, depth, scale))
        # Assign once: if an attribute was first None, NNX treats it as static, without parameters.
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
        self,
        x_BTD: Float[Array, "B T D"],
        context: MoEContext | None = None,
        *,
        mask_BT: Bool[Array, "B T"] | None = None,
        token_ids_BT: Int[Array, "B T"] | None = None,
        key: jax.Array | None = None,
        router_state: Mapping[str, jax.Array] | None = None,
        mesh: Mesh | None = None,
        deterministic: bool | None = None,
    ) -> tuple[Float[Array, "B T D"], MoEAux]:
        """Route every token through its experts.

        Args:
          x_BTD: rows of T tokens of width D.
          context: inputs shared by the layers of a model, instead of all other arguments; None:
            the layer is called alone, with those arguments.
          mask_BT: True for real tokens; None: all.  The routed experts' output for padding is 0.
          token_ids_BT: for routers that read them (hash); None: all 0.
          key: PRNG key, for routers that sample and for dropout in training; None: if nothing is
            sampled.
          router_state: of this layer (`init_router_state(config)`); None: if the router keeps none.
          mesh: from `make_mesh`; None: that of `jax.set_mesh` if it has the same four axes, else
            XLA partitions the layer with the caller's model (no expert parallelism).
          deterministic: True: evaluation, without noise and dropout, with `eval_capacity_factor`;
            None: the module's attribute.

        Returns:
          y_BTD, and MoEAux: losses (see `aux_loss`), counts and the load of every expert.

        Raises:
          UserError: a shape, mesh, key or state that does not fit; it says what to pass.
        """
        check_tokens("MoE got x", x_BTD, (None, None, self.w_in_EDUF.shape[1]), FLOATS)
        needs, replaced = self.needs(), {}
        if context is None:
            context = call_context(
                x_BTD,
                needs,
                mask_BT=mask_BT,
                token_ids_BT=token_ids_BT,
                key=key,
                router_state=router_state,
                mesh=mesh,
                deterministic=self.deterministic if deterministic is None else deterministic,
            )
        else:
            replaced = {
                "mask_BT": mask_BT,
                "token_ids_BT": token_ids_BT,
                "key": key,
                "router_state": router_state,
                "mesh": mesh,
                "deterministic": deterministic,
            }
        check_call(x_BTD, context, needs, replaced)
        return self._routed(x_BTD, context)

    def needs(self, layers: int | None = None) -> LayerNeeds:
        """The requirements of this layer on a context.

        Args:
          layers: number of equal layers that share the context; None: the layer is called alone.

        Returns:
          Router, sizes and dropout, which `check_call` compares with a context.
        """
        E, F = self.w_out_EFD.shape[:2]
        return LayerNeeds(self.router, self.router_title, E, F, self.expert_dropout, layers)

    def _routed(self, x_BTD: jax.Array, context: MoEContext) -> tuple[jax.Array, MoEAux]:
        B, T, D = x_BTD.shape
        E = self.w_in_EDUF.shape[0]
        R = context.group_rows or self.group_rows
        R = rows_in_group(B, T, R, self.router.choices_per_token, E, context.mesh)
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
            by_token, slots = token_choice(choice, R * T)
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
            stats, ledger = count_outcomes(
                choice, by_token, kept_GSK, self.dispatch.drop_cause, E, context
            )
        return y_BTD, MoEAux(aux, stats, ledger)


def _dropout(y_GSD: jax.Array, keys_GR: jax.Array, rate: float) -> jax.Array:
    """Set each number to zero with probability `rate`; multiply the others by 1 / (1 - rate)."""
    positions = y_GSD.shape[1] // keys_GR.shape[1]
    noise_GSD = row_uniform(keys_GR, EXPERT_DROPOUT, (positions, y_GSD.shape[2]), jnp.float32)
    return jnp.where(noise_GSD < rate, 0, y_GSD / (1 - rate)).astype(y_GSD.dtype)
