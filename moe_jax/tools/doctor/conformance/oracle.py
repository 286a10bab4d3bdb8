"""Computes one MoE layer in float64 on the CPU, as simply as possible.

It uses the routers' formulas, assigns slots one by one, and loops over the experts.  B rows, T
positions, G routing groups, S tokens per group, K experts per token, E experts, D width, F expert
width, U matrices into an expert, R rows per group.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import UserError
from moe_jax.model.config import ModelConfig
from moe_jax.moe.components import make_router
from moe_jax.moe.types import ExpertChoice, Outcomes, RouterIn
from moe_jax.tools.doctor.conformance.cases import SOURCES, Case, Layer
from moe_jax.tools.doctor.conformance.reference import REFERENCE, Routed, Tokens

# Weight of both auxiliary losses in the differentiated scalar, so that their gradients are not lost
# beside the output's gradient.
AUX_WEIGHT = 8.0
POSITION_BUCKETS = 8
# The oracle runs for milliseconds, so compilation dominates its cost.  At level 0 the older kernels
# of XLA's CPU backend (jax 0.10 has both) produced NaN in float64.
_OPTIONS = {"xla_backend_optimization_level": 1}


class Outcome(NamedTuple):
    """The results of a forward and a backward pass, of the layer or the oracle, as NumPy."""

    y_BTD: Any
    x_BTD: Any  # gradient
    params: Mapping[str, Any]  # gradients
    losses: Mapping[str, Any]  # sums of balance, z and entropy
    tokens: Any  # number of tokens in those sums
    outcomes: Mapping[str, Outcomes]  # axis (total, expert, position, source) -> counts
    assignments: Any
    lost_tokens: Any


def expected(layer: Layer, case: Case, keep: Callable | None = None) -> Outcome:
    """Compute the expected results for the whole batch, which do not depend on how it is split.

    Args:
      layer: the layer.
      case: its inputs.
      keep: `keep(wanted_GSK, ids_GSK) -> kept_GSK` overrides which assignments are kept, for drops
        that capacity does not explain; None: the capacity decides.
    """
    moe = layer.model.moe
    routed = route(layer.model, case, layer.train)
    wanted_GSK = routed.valid_GSK & case.mask_BT.reshape(*routed.ids_GSK.shape[:2], 1)
    kept_GSK = wanted_GSK
    if keep is not None:
        kept_GSK = keep(wanted_GSK, routed.ids_GSK)
    elif layer.components.dispatch.capacity(8, 1, 2, layer.train) is not None:
        slots = capacity(layer, routed)
        kept_GSK = slots_one_by_one(wanted_GSK, routed, moe.group_rows, slots, moe.priority)
    kept_GSE = (
        (routed.ids_GSK[..., None] == np.arange(moe.num_experts)) & kept_GSK[..., None]
    ).any(2)
    (_, (y_BTD, _)), (params, x_BTD) = _run(layer.model, case, layer.train, kept_GSE)
    losses = {"balance": routed.balance, "z": routed.z, "entropy": routed.entropy}
    counts = _counts(layer, case, routed, kept_GSK)
    return Outcome(y_BTD, x_BTD, params, losses, case.mask_BT.sum(), *counts)


def route(model: ModelConfig, case: Case, train: bool = True) -> Routed:
    """Compute the expected routing."""
    rows, positions = case.mask_BT.shape
    groups = rows // model.moe.group_rows
    nothing = np.zeros((groups, rows * positions // groups, model.moe.num_experts), bool)
    return _run(model, case, train, nothing)[0][1][1]


def _run(model: ModelConfig, case: Case, train: bool, kept_GSE) -> Any:
    """Run the oracle: ((loss, (y_BTD, Routed)), (parameter gradients, token gradient))."""
    with jax.enable_x64(True), jax.default_device(_cpu()):
        return jax.device_get(_compiled(model, train)(case.params, case.x_BTD, case, kept_GSE))


def _cpu() -> Any:
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        raise UserError(
            "The float64 oracle needs the CPU, which JAX_PLATFORMS excludes: add ,cpu to it."
        ) from None


class _Key(NamedTuple):
    """A hashable cache key, because a config's options are a mapping and have no hash."""

    model: ModelConfig

    def __hash__(self):
        return hash(repr(self.model))


def _compiled(model: ModelConfig, train: bool) -> Callable:
    """The compiled loss with gradients, shared by layers that differ only in unused settings."""
    moe = dataclasses.replace(
        model.moe, dispatch="dense", priority="token", capacity_factor=1.0, eval_capacity_factor=1.0
    )
    return _compiled_once(_Key(dataclasses.replace(model, remat="none", moe=moe)), train)


@functools.lru_cache(maxsize=64)
def _compiled_once(key: _Key, train: bool) -> Callable:
    model = key.model

    def loss(params, x_BTD, case, kept_GSE):
        routed = _route(model, train, params, x_BTD, case)
        y_BTD = _experts(model, params, x_BTD, routed, kept_GSE)
        tokens = jnp.maximum(case.mask_BT.sum(), 1)
        total = (y_BTD * case.cotangent_BTD).sum()
        total += AUX_WEIGHT * (routed.balance + routed.z) / tokens
        return total, (y_BTD, routed)

    step = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return jax.jit(step, compiler_options=_OPTIONS)


def _route(model: ModelConfig, train: bool, params, x_BTD, case: Case) -> Routed:
    R = model.moe.group_rows
    keys_B = jax.random.wrap_key_data(case.keys_B2, impl="threefry2x32")
    G = x_BTD.shape[0] // R
    tokens = Tokens(
        x_BTD.reshape(G, -1, model.width),
        case.token_ids_BT.reshape(G, -1),
        case.mask_BT.reshape(G, -1),
        keys_B.reshape(G, R),
        train,
    )
    own = {name[7:]: value for name, value in params.items() if name.startswith("router_")}
    router: Any = make_router(model.moe)
    if model.moe.router not in REFERENCE:
        return _by_itself(router, tokens, own, case.state)
    return REFERENCE[model.moe.router](tokens, own, case.state, dataclasses.asdict(router))


def _by_itself(router: Any, tokens: Tokens, params: Any, state: Any) -> Routed:
    """The result of the router's own `route`."""
    choice, aux = router.route(RouterIn(*tokens), params, state)
    made, slots = jnp.ones((), bool), None
    if isinstance(choice, ExpertChoice):
        slots, choice = choice.ids_GEC.shape[2], choice.by_token(tokens.mask_GS.shape[1])
        made = choice.valid_GSK
    made = jnp.broadcast_to(made, choice.ids_GSK.shape)
    losses = aux.balance.sum, aux.z.sum, aux.entropy.sum
    return Routed(choice.ids_GSK, choice.weights_GSK, choice.valid_GSK, made, slots, *losses)


def _experts(model: ModelConfig, params, x_BTD, routed: Routed, kept_GSE):
    """Apply every expert to every token, one expert after the other."""
    x_GSD = x_BTD.reshape(*kept_GSE.shape[:2], -1)
    y_GSD = jnp.zeros_like(x_GSD)
    for e in range(model.moe.num_experts):
        w_DUF, w_FD = params["w_in_EDUF"][e], params["w_out_EFD"][e]
        gate = jnp.tensordot(x_GSD, w_DUF[:, 0], 1)
        if model.activation == "swiglu":
            hidden = gate / (1 + jnp.exp(-gate)) * jnp.tensordot(x_GSD, w_DUF[:, 1], 1)
        else:  # the tanh approximation of GELU (arXiv 1606.08415)
            hidden = gate / 2 * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        weight_GS = jnp.where(routed.ids_GSK == e, routed.weights_GSK, 0).sum(-1)
        y_GSD += jnp.where(kept_GSE[..., e], weight_GS, 0)[..., None] * jnp.tensordot(
            hidden, w_FD, 1
        )
    return y_GSD.reshape(x_BTD.shape)


def capacity(layer: Layer, routed: Routed) -> int:
    """The capacity ceil(S * K * factor / E), at least 1 and at most S; or the router's own."""
    if routed.slots is not None:
        return int(routed.slots)
    moe = layer.model.moe
    _, tokens, choices = routed.ids_GSK.shape
    factor = moe.capacity_factor if layer.train else moe.eval_capacity_factor
    exact = Fraction(str(factor)) * tokens * choices / moe.num_experts
    return min(tokens, max(1, -(-exact.numerator // exact.denominator)))


def slots_one_by_one(wanted_GSK, routed: Routed, rows: int, slots: int, priority: str):
    """Assign slots one assignment at a time, in priority order; return which were kept."""
    groups, tokens, choices = wanted_GSK.shape
    positions = tokens // rows
    kept_GSK = np.zeros(wanted_GSK.shape, bool)
    for g in range(groups):
        first = [r * positions + t for t in range(positions) for r in range(rows)]
        if priority == "batch":
            largest_S = np.where(wanted_GSK[g], routed.weights_GSK[g], -1).max(-1)
            first = sorted(range(tokens), key=lambda s, w=largest_S: (-w[s], s))
        turns = [(s, k) for k in range(choices) for s in first]
        if priority == "token":
            turns = itertools.product(first, range(choices))
        taken = dict[int, int]()
        for s, k in turns:
            expert = int(routed.ids_GSK[g, s, k])
            if wanted_GSK[g, s, k] and taken.get(expert, 0) < slots:
                taken[expert] = taken.get(expert, 0) + 1
                kept_GSK[g, s, k] = True
    return kept_GSK


def _counts(layer: Layer, case: Case, routed: Routed, kept_GSK):
    """Count (outcomes by axis, assignments, lost tokens) with NumPy."""
    real_GSK = np.broadcast_to(case.mask_BT.reshape(*kept_GSK.shape[:2], 1), kept_GSK.shape)
    made, valid = routed.made_GSK, routed.valid_GSK
    masks: dict[str, Any] = dict.fromkeys(Outcomes._fields, np.zeros_like(kept_GSK)) | {
        "kept": kept_GSK,
        "unsampled": made & real_GSK & ~valid,
        "padding": made & ~real_GSK,
    }
    masks[layer.components.dispatch.drop_cause] = real_GSK & valid & ~kept_GSK
    rows, positions = case.mask_BT.shape
    bucket_T = np.arange(positions) * POSITION_BUCKETS // positions

    def spread(labels, count):
        labels = np.broadcast_to(labels, kept_GSK.shape)
        return Outcomes(*(np.bincount(labels[masks[f]], minlength=count) for f in Outcomes._fields))

    by_token = (*kept_GSK.shape[:2], 1)
    outcomes = {
        "total": Outcomes(*(masks[f].sum() for f in Outcomes._fields)),
        "expert": spread(routed.ids_GSK, layer.model.moe.num_experts),
        "position": spread(
            np.broadcast_to(bucket_T, (rows, positions)).reshape(by_token), POSITION_BUCKETS
        ),
        "source": spread(case.sources_BT.reshape(by_token), SOURCES),
    }
    lost = (case.mask_BT.reshape(kept_GSK.shape[:2]) & ~kept_GSK.any(-1)).sum()
    return outcomes, made.sum(), lost
