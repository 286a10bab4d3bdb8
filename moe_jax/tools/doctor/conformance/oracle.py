"""One layer in float64 on the CPU: the router's formulas, slots one by one, a loop over experts."""

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
from moe_jax.moe.types import ExpertChoice, Fates, RouterIn
from moe_jax.tools.doctor.conformance.cases import SOURCES, Case, Layer
from moe_jax.tools.doctor.conformance.reference import REFERENCE, Routed, Tokens

# Of both auxiliary losses in the scalar that is differentiated, so that their gradients are not
# lost beside the output's.
AUX_WEIGHT = 8.0
POSITION_BUCKETS = 8
# It runs for milliseconds, so compiling it is what costs.  At level 0 the older kernels of XLA's
# CPU backend (jax 0.10 has both) were seen to make NaN of float64.
_OPTIONS = {"xla_backend_optimization_level": 1}


class Outcome(NamedTuple):
    """What a forward and a backward pass gave, as NumPy; of the layer and of the oracle alike."""

    y_BTD: Any
    x_BTD: Any  # gradient
    params: Mapping[str, Any]  # gradients
    losses: Mapping[str, Any]  # balance, z and entropy: sums
    tokens: Any  # that they count
    fates: Mapping[str, Fates]  # total, expert, position, source
    assignments: Any
    lost_tokens: Any


def expected(layer: Layer, case: Case, keep: Callable | None = None) -> Outcome:
    """What the layer should give for the whole batch, however it is split.

    `keep(wanted_GSK, ids_GSK) -> kept_GSK` says who reaches an expert where the capacity alone
    does not.
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
    """What the router should answer."""
    rows, positions = case.mask_BT.shape
    groups = rows // model.moe.group_rows
    nothing = np.zeros((groups, rows * positions // groups, model.moe.num_experts), bool)
    return _run(model, case, train, nothing)[0][1][1]


def _run(model: ModelConfig, case: Case, train: bool, kept_GSE) -> Any:
    """((loss, (y_BTD, Routed)), (gradients of the parameters, gradient of the tokens))."""
    with jax.enable_x64(True), jax.default_device(_cpu()):
        return jax.device_get(_compiled(model, train)(case.params, case.x_BTD, case, kept_GSE))


def _cpu() -> Any:
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        raise UserError(
            "The float64 oracle runs on the CPU, which JAX_PLATFORMS leaves out: add ,cpu to it."
        ) from None


class _Key(NamedTuple):
    """Of the cache: a config's options, a mapping, have no hash."""

    model: ModelConfig

    def __hash__(self):
        return hash(repr(self.model))


def _compiled(model: ModelConfig, train: bool) -> Callable:
    """The loss with gradients; one for all layers that differ only in what is no part of it."""
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
    """The router's own answer."""
    choice, aux = router.route(RouterIn(*tokens), params, state)
    made, slots = jnp.ones((), bool), None
    if isinstance(choice, ExpertChoice):
        slots, choice = choice.ids_GEC.shape[2], choice.by_token(tokens.mask_GS.shape[1])
        made = choice.valid_GSK
    made = jnp.broadcast_to(made, choice.ids_GSK.shape)
    losses = aux.balance.sum, aux.z.sum, aux.entropy.sum
    return Routed(choice.ids_GSK, choice.weights_GSK, choice.valid_GSK, made, slots, *losses)


def _experts(model: ModelConfig, params, x_BTD, routed: Routed, kept_GSE):
    """Every expert on every token, one after the other."""
    x_GSD = x_BTD.reshape(*kept_GSE.shape[:2], -1)
    y_GSD = jnp.zeros_like(x_GSD)
    for e in range(model.moe.num_experts):
        w_DUF, w_FD = params["w_in_EDUF"][e], params["w_out_EFD"][e]
        gate = jnp.tensordot(x_GSD, w_DUF[:, 0], 1)
        if model.activation == "swiglu":
            hidden = gate / (1 + jnp.exp(-gate)) * jnp.tensordot(x_GSD, w_DUF[:, 1], 1)
        else:  # GELU in its tanh form (arXiv 1606.08415)
            hidden = gate / 2 * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        weight_GS = jnp.where(routed.ids_GSK == e, routed.weights_GSK, 0).sum(-1)
        y_GSD += jnp.where(kept_GSE[..., e], weight_GS, 0)[..., None] * jnp.tensordot(
            hidden, w_FD, 1
        )
    return y_GSD.reshape(x_BTD.shape)


def capacity(layer: Layer, routed: Routed) -> int:
    """ceil(S * K * factor / E) in exact arithmetic, between 1 and S; or the router's own bound."""
    if routed.slots is not None:
        return int(routed.slots)
    moe = layer.model.moe
    _, tokens, choices = routed.ids_GSK.shape
    factor = moe.capacity_factor if layer.train else moe.eval_capacity_factor
    exact = Fraction(str(factor)) * tokens * choices / moe.num_experts
    return min(tokens, max(1, -(-exact.numerator // exact.denominator)))


def slots_one_by_one(wanted_GSK, routed: Routed, rows: int, slots: int, priority: str):
    """Which assignments get a slot: each asks in turn."""
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
    """(fates by axis, assignments, lost tokens), counted with NumPy."""
    real_GSK = np.broadcast_to(case.mask_BT.reshape(*kept_GSK.shape[:2], 1), kept_GSK.shape)
    made, valid = routed.made_GSK, routed.valid_GSK
    masks: dict[str, Any] = dict.fromkeys(Fates._fields, np.zeros_like(kept_GSK)) | {
        "kept": kept_GSK,
        "unsampled": made & real_GSK & ~valid,
        "padding": made & ~real_GSK,
    }
    masks[layer.components.dispatch.drop_cause] = real_GSK & valid & ~kept_GSK
    rows, positions = case.mask_BT.shape
    bucket_T = np.arange(positions) * POSITION_BUCKETS // positions

    def spread(labels, count):
        labels = np.broadcast_to(labels, kept_GSK.shape)
        return Fates(*(np.bincount(labels[masks[f]], minlength=count) for f in Fates._fields))

    by_token = (*kept_GSK.shape[:2], 1)
    fates = {
        "total": Fates(*(masks[f].sum() for f in Fates._fields)),
        "expert": spread(routed.ids_GSK, layer.model.moe.num_experts),
        "position": spread(
            np.broadcast_to(bucket_T, (rows, positions)).reshape(by_token), POSITION_BUCKETS
        ),
        "source": spread(case.sources_BT.reshape(by_token), SOURCES),
    }
    lost = (case.mask_BT.reshape(kept_GSK.shape[:2]) & ~kept_GSK.any(-1)).sum()
    return fates, made.sum(), lost
