"""Runs a router alone, without experts, to study the assignments that it makes.

Axes: B rows, T positions per row, D width, G routing groups, S tokens per group, K assignments per
token, E experts.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.errors import UserError
from moe_jax.moe.call import FLOATS, INTEGERS, KEYS, check_array, check_tokens
from moe_jax.moe.dispatch_types import DispatchIn
from moe_jax.moe.experts import Experts
from moe_jax.moe.types import Choice, Dispatch, Router, RouterAux, RouterIn, token_choice


@dataclasses.dataclass(frozen=True)
class RouterStudy:
    """The result of `study_router`: one batch of tokens, routed once.

    Attributes:
      choice: the experts of every token, or the tokens of every expert.
      aux: balance loss, z-loss and entropy; `.value()` of each is its mean.
      params, state: the router's, with which the choice was made.
      load_E: sampled assignments per expert, before any drop.
      rows: per routing group.
    """

    choice: Choice
    aux: RouterAux
    params: Mapping[str, jax.Array]
    state: Mapping[str, jax.Array]
    load_E: Int[Array, "E"]
    rows: int

    def drop_fraction(self, dispatch: Dispatch, *, train: bool = True) -> Float[Array, ""]:
        """The share of sampled assignments that a dispatch path drops.

        Args:
          dispatch: from `make_dispatch`, or your own.
          train: True: with the capacity of training.  False: with that of evaluation.

        Returns:
          A scalar from 0 (nothing is dropped) to 1.
        """
        E = self.load_E.shape[0]
        tokens = self.choice[0].shape[1]
        by_token, slots = token_choice(self.choice, tokens)
        G, S = by_token.ids_GSK.shape[:2]
        none = Experts(jnp.zeros((E, 1, 1, 1)), jnp.zeros((E, 1, 1)), "gelu")
        inputs = DispatchIn(jnp.ones((G, S), bool), self.rows, train, None, slots)
        _, kept_GSK = dispatch(jnp.zeros((G, S, 1)), by_token, none, inputs)
        return 1 - kept_GSK.sum() / jnp.maximum(by_token.valid_GSK.sum(), 1)


def study_router(
    router: Router,
    x_BTD: Float[Array, "B T D"],
    *,
    num_experts: int | None = None,
    params: Mapping[str, jax.Array] | None = None,
    state: Mapping[str, jax.Array] | None = None,
    token_ids_BT: Int[Array, "B T"] | None = None,
    key: jax.Array | None = None,
    group_rows: int = 1,
    deterministic: bool = True,
) -> RouterStudy:
    """Route tokens once, without experts.

    Args:
      router: from `make_router`, or your own.
      x_BTD: rows of T tokens of width D, none of them padding.
      num_experts: E; None: the number in the config that `make_router` used, or in `params`.
      params: of the router, by name; None: drawn from its `ParamSpec`s.
      state: of the router; None: its initial state.
      token_ids_BT: for routers that read them (hash); None: all 0.
      key: PRNG key of the parameters and of the router's noise; None: `jax.random.key(0)`.
      group_rows: rows per routing group.
      deterministic: True: without noise, as in evaluation.

    Returns:
      The choice, its losses, and the load of every expert.

    Raises:
      UserError: a shape, key, parameter or state that does not fit, an unknown number of experts,
        or a number of rows that the groups do not divide.
    """
    check_tokens("study_router got x", x_BTD, (None, None, None), FLOATS)
    B, T, D = x_BTD.shape
    if group_rows < 1 or B % group_rows:
        raise UserError(
            f"study_router got {B} rows, which group_rows ({group_rows}) does not divide: pass "
            f"group_rows= a divisor of {B}."
        )
    E = _num_experts(router, D, num_experts, params)
    key = jax.random.key(0) if key is None else key
    check_array("key", key, (), KEYS)
    specs, states = router.param_specs(D, E), router.state_specs(E)
    if params is None:
        keys = jax.random.split(key, max(1, len(specs)))
        params = {
            name: spec.std * jax.random.truncated_normal(own, -3, 3, spec.shape)
            for own, (name, spec) in zip(keys, specs.items(), strict=False)
        }
    if state is None:
        state = {n: jnp.full(s.shape, s.initial) for n, s in states.items()}
    for what, given, wanted in (("params", params, specs), ("state", state, states)):
        if given.keys() != wanted.keys():
            names = ", ".join(sorted(wanted)) or "nothing"
            raise UserError(
                f"study_router got {what} {sorted(given)}: pass {names}, or leave {what}= out."
            )
        for name, spec in wanted.items():
            check_array(f"{what}[{name!r}]", given[name], spec.shape, FLOATS)
    G, S = B // group_rows, group_rows * T
    ids_BT = jnp.zeros((B, T), jnp.int32) if token_ids_BT is None else token_ids_BT
    check_array("token_ids_BT", ids_BT, (B, T), INTEGERS)
    inputs = RouterIn(
        x_GSD=x_BTD.reshape(G, S, D),
        token_ids_GS=ids_BT.reshape(G, S),
        mask_GS=jnp.ones((G, S), bool),
        keys_GR=jax.random.split(key, B).reshape(G, group_rows),
        train=not deterministic,
    )
    choice, aux = router.route(inputs, params, state)
    by_token, _ = token_choice(choice, S)
    hits_GSKE = (by_token.ids_GSK[..., None] == jnp.arange(E)) & by_token.valid_GSK[..., None]
    load_E = hits_GSKE.sum((0, 1, 2), dtype=jnp.int32)
    return RouterStudy(choice, aux, params, state, load_E, group_rows)


def _num_experts(
    router: Router, width: int, num_experts: int | None, params: Mapping[str, jax.Array] | None
) -> int:
    """E, from the argument, the router and the parameters, which must agree."""
    said = {"num_experts": num_experts, "the router": getattr(router, "num_experts", None)}
    for name, spec in router.param_specs(width, 1).items():
        if params and name in params:
            for axis, size in zip(spec.logical_axes, params[name].shape, strict=False):
                if axis == "router_experts":
                    said[f"params[{name!r}]"] = size
    known = {who: count for who, count in said.items() if count}
    if not known:
        raise UserError(
            f"study_router does not know how many experts {type(router).__name__} chooses from: "
            f"pass num_experts=, or a router from make_router(config)."
        )
    if len(set(known.values())) > 1:
        counts = " and ".join(f"{count} from {who}" for who, count in known.items())
        raise UserError(f"study_router got different numbers of experts ({counts}): pass one.")
    return next(iter(known.values()))
