"""Reimplements the routers in float64 from their papers' formulas, without the package's code.

A router without an entry in REFERENCE is compared with its own `route` in float64 on one device,
which checks its gradient, mesh, dtype and dispatch, but not its formulas.  G routing groups, S
tokens per group, K experts per token, E experts, D width, R rows per group.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# The purposes of noise, numbered as in moe/noise.py; reproducible runs depend on these numbers.
JITTER, SECOND_EXPERT, NOISY_LOGITS = 0, 1, 2


class Tokens(NamedTuple):
    """A router's inputs; the S tokens of a group are its rows, one after the other."""

    x_GSD: Any
    ids_GS: Any
    mask_GS: Any
    keys_GR: Any
    train: bool


class Routed(NamedTuple):
    """A router's results; losses are sums over tokens that are not padding."""

    ids_GSK: Any
    weights_GSK: Any
    valid_GSK: Any  # sampled
    made_GSK: Any  # True: an assignment; with expert choice most pairs are not
    slots: int | None  # slots per expert per group; None: the router does not bound them
    balance: Any
    z: Any
    entropy: Any


def _noise(draw: Callable, t: Tokens, purpose: int, *width: int) -> Any:
    """Noise [G, S, *width], drawn in float32 from each row's own key."""
    G, R = t.keys_GR.shape
    shape = (t.x_GSD.shape[1] // R, *width)

    def of_row(key):
        return draw(jax.random.fold_in(key, purpose), shape, jnp.float32)

    return jax.vmap(of_row)(t.keys_GR.reshape(-1)).reshape(G, -1, *width).astype(jnp.float64)


def _logits(t: Tokens, kernel_DE: Any, knobs: Mapping[str, Any], cap: bool = True) -> Any:
    x_GSD = t.x_GSD
    if t.train and knobs["jitter"]:
        u = _noise(jax.random.uniform, t, JITTER, x_GSD.shape[-1])
        x_GSD = x_GSD * (1 - knobs["jitter"] + 2 * knobs["jitter"] * u)
    logits = jnp.tensordot(x_GSD, kernel_DE, 1)
    bound = knobs["logit_cap"]
    return bound * jnp.tanh(logits / bound) if bound and cap else logits


def _softmax(a: Any) -> Any:
    powers = jnp.exp(a - a.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _best(scores: Any, choices: int) -> Any:
    """The indices of the largest scores, largest first; ties go to the lower index."""
    return jnp.argsort(-jax.lax.stop_gradient(scores), axis=-1, stable=True)[..., :choices]


def _at(a: Any, ids: Any) -> Any:
    return jnp.take_along_axis(a, ids, -1)


def _over_parts(t: Tokens, scope: str, loss: Callable) -> Any:
    """Sum loss(mask [G, S, 1], tokens) * tokens over the parts that `scope` balances together."""
    G, S = t.mask_GS.shape
    R = t.keys_GR.shape[1]
    number = np.arange(G * S).reshape(G, S)
    part = {"group": number // S, "row": number // (S // R), "global": number * 0}[scope]

    def of_part(p):
        mask = ((part == p) & t.mask_GS)[..., None].astype(jnp.float64)
        return mask.sum() * loss(mask, jnp.maximum(mask.sum(), 1))

    return jax.vmap(of_part)(np.arange(part.max() + 1)).sum()


def _switch_balance(t: Tokens, probs: Any, ids: Any, scope: str) -> Any:
    """E * sum_e (share of assignments) * (mean probability): arXiv 2101.03961, eq. 4 to 6."""
    E, K = probs.shape[-1], ids.shape[-1]
    picked = sum(ids[..., k, None] == np.arange(E) for k in range(K))

    def loss(mask, tokens):
        f_E = (picked * mask).sum((0, 1)) / (K * tokens)
        return E * (f_E * (probs * mask).sum((0, 1)) / tokens).sum()

    return _over_parts(t, scope, loss)


def _squared_cv(sums_E: Any) -> Any:
    return jnp.var(sums_E) / jnp.maximum(sums_E.mean() ** 2, 1e-30)


def _routed(t: Tokens, logits: Any, probs: Any, ids: Any, weights: Any, balance: Any) -> Routed:
    """Make a result in which every assignment is sampled, with its z-loss and entropy."""
    highest = logits.max(-1)
    z_GS = (highest + jnp.log(jnp.exp(logits - highest[..., None]).sum(-1))) ** 2
    entropy_GS = -jnp.where(probs > 0, probs * jnp.log(jnp.where(probs > 0, probs, 1)), 0).sum(-1)
    every = jnp.ones(ids.shape, bool)
    z, entropy = (jnp.where(t.mask_GS, value, 0).sum() for value in (z_GS, entropy_GS))
    return Routed(ids, weights, every, every, None, balance, z, entropy)


def switch(t: Tokens, params: Any, state: Any, knobs: Any) -> Routed:
    """Choose the most probable expert, weighted by its probability (arXiv 2101.03961)."""
    logits = _logits(t, params["kernel"], knobs)
    probs = _softmax(logits)
    ids = _best(probs, 1)
    balance = _switch_balance(t, probs, ids, knobs["balance_scope"])
    return _routed(t, logits, probs, ids, _at(probs, ids), balance)


def top_k(t: Tokens, params: Any, state: Any, knobs: Any) -> Routed:
    """Choose the K most probable experts (arXiv 2401.04088, 2409.02060)."""
    logits = _logits(t, params["kernel"], knobs)
    probs = _softmax(logits)
    ids = _best(probs, knobs["top_k"])
    weights = _at(probs, ids)
    if knobs["renormalize"]:
        weights = _softmax(_at(logits, ids))
    balance = _switch_balance(t, probs, ids, knobs["balance_scope"])
    return _routed(t, logits, probs, ids, weights, balance)


def gshard(t: Tokens, params: Any, state: Any, knobs: Any) -> Routed:
    """Choose two experts, the second with probability twice its weight (arXiv 2006.16668).

    The balance loss counts only the first.
    """
    logits = _logits(t, params["kernel"], knobs)
    probs = _softmax(logits)
    ids = _best(probs, 2)
    weights = _softmax(_at(logits, ids))
    balance = _switch_balance(t, probs, ids[..., :1], knobs["balance_scope"])
    routed = _routed(t, logits, probs, ids, weights, balance)
    if not (t.train and knobs["random_second"]):
        return routed
    u_GS = _noise(jax.random.uniform, t, SECOND_EXPERT)
    second = u_GS < 2 * weights[..., 1]
    return routed._replace(valid_GSK=jnp.stack([jnp.ones_like(second), second], -1))


def noisy_top_k(t: Tokens, params: Any, state: Any, knobs: Any) -> Routed:
    """Choose the K largest noisy logits (arXiv 1701.06538, equations 3 to 11)."""
    clean = _logits(t, params["kernel"], knobs)
    E, K = clean.shape[-1], knobs["top_k"]
    noisy, std = clean, None
    if t.train:
        std = jnp.maximum(
            jnp.logaddexp(_logits(t, params["noise_kernel"], knobs, cap=False), 0), 1e-6
        )
        noisy = clean + _noise(jax.random.normal, t, NOISY_LOGITS, E) * std
    ids = _best(noisy, K)
    weights = _softmax(_at(noisy, ids))
    gates = sum((ids[..., k, None] == np.arange(E)) * weights[..., k, None] for k in range(K))
    load = (ids[..., None] == np.arange(E)).any(-2).astype(jnp.float64)
    if std is not None and K < E:
        others = jnp.where(np.eye(E, dtype=bool), -jnp.inf, noisy[..., None, :])
        rival = jnp.sort(others, axis=-1)[..., -K]
        load = 0.5 * (1 + jax.lax.erf((clean - rival) / std / np.sqrt(2)))

    def loss(mask, tokens):
        sums = (gates * mask).sum((0, 1)), (load * mask).sum((0, 1))
        return 1 + _squared_cv(sums[0]) + _squared_cv(sums[1])

    balance = _over_parts(t, knobs["balance_scope"], loss)
    return _routed(t, clean, _softmax(clean), ids, weights, balance)


def sigmoid_bias(t: Tokens, params: Any, state: Any, knobs: Any) -> Routed:
    """Choose by sigmoid scores plus a bias, within groups (arXiv 2412.19437, eq. 12 to 20)."""
    logits = _logits(t, params["kernel"], knobs)
    scores = 1 / (1 + jnp.exp(-logits))
    biased, n = scores + state["bias"], knobs["expert_groups"]
    by_group = biased.reshape(*biased.shape[:-1], n, -1)
    two = jnp.sort(by_group, axis=-1)[..., -2:].sum(-1)
    stays = (_best(two, knobs["top_groups"])[..., None] == np.arange(n)).any(-2)
    allowed = jnp.where(jnp.repeat(stays, by_group.shape[-1], axis=-1), biased, -jnp.inf)
    ids = _best(allowed, knobs["top_k"])
    weights = _at(scores, ids)
    if knobs["renormalize"]:
        weights = weights / weights.sum(-1, keepdims=True)
    probs = scores / scores.sum(-1, keepdims=True)
    balance = _switch_balance(t, probs, ids, knobs["balance_scope"])
    return _routed(t, logits, probs, ids, weights * knobs["routed_scale"], balance)


def expert_choice(t: Tokens, params: Any, state: Any, knobs: Any) -> Routed:
    """Let each expert choose its top C tokens (arXiv 2202.09368).

    Padding comes last, earlier padding first.
    """
    logits = _logits(t, params["kernel"], knobs)
    probs = _softmax(logits)
    G, S, E = probs.shape
    slots = min(S, -(-S * knobs["top_k"] // E))
    wanted = jnp.where(t.mask_GS[..., None], probs, -1.0).swapaxes(1, 2)
    rank = jnp.argsort(jnp.argsort(-jax.lax.stop_gradient(wanted), stable=True), stable=True)
    taken = (rank < slots).swapaxes(1, 2)
    ids = jnp.broadcast_to(np.arange(E), (G, S, E))
    routed = _routed(t, logits, probs, ids, probs, t.mask_GS.sum() * 1.0)
    return routed._replace(valid_GSK=taken, made_GSK=taken, slots=slots)


def soft(t: Tokens, params: Any, state: Any, knobs: Any) -> Routed:
    """Use every expert, weighted by the softmax."""
    logits = _logits(t, params["kernel"], knobs)
    probs = _softmax(logits)
    ids = jnp.broadcast_to(np.arange(probs.shape[-1]), probs.shape)
    return _routed(t, logits, probs, ids, probs, t.mask_GS.sum() * 1.0)


def hash_table(t: Tokens, params: Any, state: Any, knobs: Any) -> Routed:
    """Look up experts by token id in a balanced table (arXiv 2106.04426).

    There are no parameters, so z and entropy are 0.
    """
    E, K, size = knobs["num_experts"], knobs["top_k"], knobs["table_size"]
    bits = np.random.PCG64(knobs["seed"])
    draws = [int(bits.random_raw()) for _ in range(size)]
    number = sorted(range(size), key=draws.__getitem__)
    shifts = []
    for _ in range(-(-size // E)):
        draws = [int(bits.random_raw()) for _ in range(E)]
        shifts.append(sorted(range(E), key=draws.__getitem__))
    table = [[(n + shifts[n // E][k]) % E for k in range(K)] for n in number]
    ids = jnp.asarray(table)[t.ids_GS % size]
    shares = (ids[..., None] == np.arange(E)).mean(-2)
    weights = jnp.full(ids.shape, 1 / K)
    balance = _switch_balance(t, shares, ids, knobs["balance_scope"])
    return _routed(t, jnp.zeros_like(shares), shares, ids, weights, balance)._replace(
        z=0.0, entropy=0.0
    )


REFERENCE: dict[str, Callable[[Tokens, Any, Any, Mapping[str, Any]], Routed]] = {
    "switch": switch,
    "gshard": gshard,
    "top_k": top_k,
    "noisy_top_k": noisy_top_k,
    "sigmoid_bias": sigmoid_bias,
    "expert_choice": expert_choice,
    "hash": hash_table,
    "soft": soft,
}
