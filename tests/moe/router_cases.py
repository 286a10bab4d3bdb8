"""Inputs of router calls, and NumPy versions of the parts that routers share.

Axes: G routing groups, R rows per group, T positions per row, S = R*T tokens per group, D width, E
experts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.moe.types import RouterIn

G, R, T, D, E = 4, 2, 6, 8, 6
S = R * T
SCOPES = ("group", "row", "global")


def inputs(seed=0, train=True, padded=True, groups=G, positions=T) -> RouterIn:
    """Random tokens; with `padded`, rows end in padding and one row is all padding."""
    rng = np.random.default_rng(seed)
    shape = (groups, R, positions)
    lengths = rng.integers(0, positions + 1, (groups, R, 1)) if padded else positions
    if padded:
        lengths[0, 1] = 0
    mask = np.broadcast_to(np.arange(positions) < lengths, shape).reshape(groups, -1)
    return RouterIn(
        x_GSD=jnp.asarray(rng.normal(size=(groups, R * positions, D))),
        token_ids_GS=jnp.asarray(rng.integers(0, 50, mask.shape), jnp.int32),
        mask_GS=jnp.asarray(mask),
        keys_GR=jax.random.split(jax.random.key(seed), (groups, R)),
        train=train,
    )


def kernel(seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(D, E)))


def logits_inputs(logits_SE, train=False) -> RouterIn:
    """One row of real tokens that get the logits `logits_SE` with the kernel `jnp.eye(E)`."""
    x_GSD = jnp.asarray(logits_SE, jnp.float64)[None]
    return RouterIn(
        x_GSD=x_GSD,
        token_ids_GS=jnp.zeros(x_GSD.shape[:2], jnp.int32),
        mask_GS=jnp.ones(x_GSD.shape[:2], bool),
        keys_GR=jax.random.split(jax.random.key(0), (1, 1)),
        train=train,
    )


def route_all(router, given: RouterIn, params, state):
    """`router.route`, compiled once per router and shape."""
    arrays = (given.x_GSD, given.token_ids_GS, given.mask_GS, given.keys_GR)
    return _route(router, given.train, arrays, params, state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _route(router, train, arrays, params, state):
    return router.route(RouterIn(*arrays, train), params, state)


def same_rows_in_other_groups(given: RouterIn) -> RouterIn:
    """The same rows in groups of one and in reverse order, as a different microbatch holds them."""
    rows = G * R

    def turn(a):
        return a.reshape(rows, T, *a.shape[2:])[::-1]

    return RouterIn(
        turn(given.x_GSD),
        turn(given.token_ids_GS),
        turn(given.mask_GS),
        given.keys_GR.reshape(rows, 1)[::-1],
        given.train,
    )


def softmax(logits):
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def scope_parts(scope):
    """The number of parts, and the tokens per part."""
    return {"group": (G, S), "row": (G * R, T), "global": (1, G * S)}[scope]


def numpy_balance(probs, ids, mask, scope):
    """The (sum, count) of E * sum_e f_e * P_e, by a loop over the parts of `scope`."""
    parts = scope_parts(scope)
    probs, ids = probs.reshape(*parts, E), ids.reshape(*parts, -1)
    total = count = 0.0
    for p, i, m in zip(probs, ids, mask.reshape(parts), strict=True):
        tokens = m.sum()
        if tokens:
            f = np.bincount(i[m].reshape(-1), minlength=E) / (tokens * i.shape[-1])
            total += E * (f * p[m].mean(0)).sum() * tokens
            count += tokens
    return total, count


def assert_aux(aux, mask, balance, logits=None, probs=None):
    """Assert balance (sum, count), z-loss (of `logits`) and entropy (of `probs`); None: zero."""
    zero = np.zeros(mask.shape)
    z = zero if logits is None else np.log(np.exp(logits).sum(-1)) ** 2
    entropy = zero if probs is None else -(probs * np.log(probs)).sum(-1)
    expected = (balance, (z[mask].sum(), mask.sum()), (entropy[mask].sum(), mask.sum()))
    assert aux.probs is None  # only for `balance_layers` pooled
    for found, (total, count) in zip(aux[:3], expected, strict=True):
        np.testing.assert_allclose(found.sum, total, rtol=1e-12, atol=1e-13)
        assert found.count == count


def worth(choice, value_E):
    """The combined output, summed over all tokens, if expert e outputs value_E[e] for every one."""
    return (choice.weights_GSK * value_E[choice.ids_GSK] * choice.valid_GSK).sum()


def central_difference(function, array, index, step=1e-6):
    """The derivative of `function` with respect to array[index], by central differences."""
    shift = np.zeros(array.shape)
    shift[index] = step
    return (float(function(array + shift)) - float(function(array - shift))) / (2 * step)
