"""Fits scaling laws to arrays: Huber loss on log L, BFGS from several starts, bootstrap.

Letters as in laws.py.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from moe_jax.errors import UserError
from moe_jax.tools.results.laws import S_BASE, Array, Law, Saturation, design, log_loss

DELTA = 1e-3  # of the Huber loss, in log L: residuals above 0.1% count linearly
RESAMPLES = 100
MIN_RESAMPLES = 20  # fewer give no interval
_DRAWS = 10  # per resample
_SAME = 1.2  # sizes or horizons whose ratio is below this count as one
_RANK = 1e-6  # smallest singular value of a term's design with columns of norm 1
# Starts: the constant's share of the lowest loss, and the first term's share of the rest.
_CONSTANTS, _FIRSTS = (0.2, 0.5, 0.8), (0.3, 0.7)
_QUANTILES = (0.05, 0.95)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The law fitted without the largest size, against the runs of that size.

    Attributes:
      runs: their places among all runs, int.
      predicted: their predicted losses, nats per token, float [runs].
      error: predicted over measured loss, less 1, float [runs].
    """

    runs: Array
    predicted: Array
    error: Array


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
      law: the law.
      saturation: E_start and E_max.
      theta: fitted coefficients, float [P]; those of `law.factors` as logarithms.
      values: name of a coefficient -> its value.
      intervals: name of a coefficient -> its 90% bootstrap interval; empty: too few resamples.
      resamples: resamples that determine all coefficients.
      fitted: fitted losses of all runs, nats per token, float [R].
      held_out: the check on the largest size, or why there is none.
    """

    law: Law
    saturation: Saturation
    theta: Array
    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    resamples: int
    fitted: Array
    held_out: HeldOut | str


def fit(
    law: Law,
    n: Array,
    e: Array,
    d: Array,
    loss: Array,
    saturation: Saturation = S_BASE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Fit:
    """Fit a law, with bootstrap intervals over runs and a check on the largest size.

    Minimizes the mean Huber loss (delta 1e-3) of log L by BFGS, the best of several starts.  Each
    resample of the runs is fitted from the optimum of all runs; resamples that do not
    determine all coefficients are drawn again.

    Args:
      law: the law.
      n: active parameters N outside embedding table and head, float [R].
      e: experts per choice E, 1 for a dense model, float [R].
      d: training tokens D, float [R].
      loss: held-out loss L, nats per token, float [R].
      saturation: E_start and E_max.
      resamples: of the bootstrap; below MIN_RESAMPLES there are no intervals.
      seed: of the bootstrap; 0 is a seed like any other.

    Returns:
      The fit.

    Raises:
      UserError: too few different settings, several horizons where the law has one, or not
        0 < E_start < E_max.

    Reference: Hoffmann et al., arXiv 2203.15556, section 3.3 and appendix D.2.
    """
    reason = shortage(law, n, e, d)
    if reason:
        raise UserError(f"--fit={law.name} {reason}")
    design_KRP = design(law, n, e, d, saturation)
    theta = _solve(design_KRP, np.log(loss))
    draw = np.random.default_rng(seed)
    settings = _settings(law, n, e, d)
    samples = _bootstrap(design_KRP, np.log(loss), settings, theta, resamples, draw)
    intervals = {}
    if len(samples) >= MIN_RESAMPLES:
        low, high = np.quantile([list(_values(law, s).values()) for s in samples], _QUANTILES, 0)
        bounds = zip(law.coefficients, low, high, strict=True)
        intervals = {name: (float(a), float(b)) for name, a, b in bounds}
    return Fit(
        law,
        saturation,
        theta,
        _values(law, theta),
        intervals,
        len(samples),
        np.exp(log_loss(design_KRP, theta)),
        _hold_out(law, n, e, d, loss, saturation),
    )


def predict(found: Fit, n: Array, e: Array, d: Array) -> Array:
    """Compute the law's losses.

    Args:
      found: the fitted law.
      n: active parameters N, float [R].
      e: experts per choice E, float [R].
      d: training tokens D, float [R].

    Returns:
      Losses in nats per token, float [R].

    Raises:
      UserError: not 0 < E_start < E_max.
    """
    return np.exp(log_loss(design(found.law, n, e, d, found.saturation), found.theta))


def shortage(law: Law, n: Array, e: Array, d: Array) -> str:
    """Say why runs do not determine a law.

    Args:
      law: the law.
      n: active parameters N, float [R].
      e: experts per choice E, float [R].
      d: training tokens D, float [R].

    Returns:
      The rest of a sentence after the law's name, and what to do; empty: they determine it.
    """
    if law.one_horizon and len(d) and d.max() > 1.01 * d.min():
        return (
            f"needs runs of one horizon, and these have {d.min():,.0f} to {d.max():,.0f} tokens: "
            f"use --fit=joint, or a --workdir with runs of equal length."
        )
    if "E" not in law.least and len(e) and e.max() > e.min():
        return (
            f"needs runs of one E, and these have {e.min():g} to {e.max():g}: use --fit=joint, or "
            f"a --workdir with runs of one E."
        )
    number, needed = len(np.unique(_settings(law, n, e, d))), len(law.coefficients) + 1
    if number < needed:
        return (
            f"needs at least {needed} different settings of ({', '.join(law.least)}), one more "
            f"than it has coefficients, and the finished runs have {number}: add runs."
        )
    for letter, values in (("N", n), ("E", e), ("D", d)):
        least, found = law.least.get(letter, 1), int(classes(values).max()) + 1
        if found < least:
            return (
                f"needs at least {least} values of {letter} that differ by {_SAME - 1:.0%} or "
                f"more, and the finished runs have {found}: add runs."
            )
    if not _has_full_rank(design(law, n, e, d, S_BASE)):
        return f"needs every size N with several values of {law.crossed}: add runs."
    return ""


def classes(values: Array) -> Array:
    """Number values by size, from 0; neighbours within 20% are in one class.

    Routers make N depend a little on E, so models of one size do not have equal N.

    Args:
      values: above 0, float [R].

    Returns:
      The class of each value, int [R]; the last class has the largest values.
    """
    order = np.argsort(values)
    steps = np.diff(np.log(values[order])) > np.log(_SAME)
    found = np.zeros(len(values), int)
    found[order] = np.concatenate([[0], np.cumsum(steps)])
    return found


def _settings(law: Law, n: Array, e: Array, d: Array) -> Array:
    """The number of each run's setting of the letters that the law varies, int [R]."""
    letters = {"N": n, "E": e, "D": d}
    rows = np.stack([letters[letter] for letter in law.least], -1)
    return np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)


def _has_full_rank(design_KRP: Array) -> bool:
    """True if the runs tell the coefficients of each term apart."""
    for x_RP in design_KRP:
        own = x_RP[:, np.any(x_RP != 0, axis=0)]
        if np.linalg.matrix_rank(own / np.linalg.norm(own, axis=0), tol=_RANK) < own.shape[1]:
            return False
    return True


def _values(law: Law, theta: Array) -> dict[str, float]:
    pairs = zip(law.coefficients, theta, strict=True)
    return {name: float(np.exp(x) if name in law.factors else x) for name, x in pairs}


def _hold_out(
    law: Law, n: Array, e: Array, d: Array, loss: Array, saturation: Saturation
) -> HeldOut | str:
    """Fit without the largest size, and predict it."""
    size = classes(n)
    rest, last = size < size.max(), size == size.max()
    reason = shortage(law, n[rest], e[rest], d[rest])
    if reason:
        return f"without the largest size, --fit={law.name} {reason}"
    theta = _solve(design(law, n[rest], e[rest], d[rest], saturation), np.log(loss[rest]))
    predicted = np.exp(log_loss(design(law, n[last], e[last], d[last], saturation), theta))
    return HeldOut(np.flatnonzero(last), predicted, predicted / loss[last] - 1)


def _bootstrap(
    design_KRP: Array,
    log_L: Array,
    settings: Array,
    theta: Array,
    resamples: int,
    draw: np.random.Generator,
) -> list[Array]:
    """Coefficients of up to `resamples` resamples that determine all coefficients."""
    runs, found = len(log_L), []
    basis = _basis(design_KRP)
    for _ in range(_DRAWS * resamples):
        if len(found) == resamples:
            break
        chosen = draw.integers(runs, size=runs)
        enough = len(np.unique(settings[chosen])) >= design_KRP.shape[2]
        if enough and _has_full_rank(design_KRP[:, chosen]):
            weights = np.bincount(chosen, minlength=runs) / runs
            found.append(_descend(design_KRP, log_L, weights, basis, theta)[1])
    return found


def _solve(design_KRP: Array, log_L: Array) -> Array:
    """The best optimum over all starts."""
    weights, basis = np.full(len(log_L), 1 / len(log_L)), _basis(design_KRP)
    starts = _starts(design_KRP, log_L)
    ends = [_descend(design_KRP, log_L, weights, basis, start) for start in starts]
    return min(ends, key=lambda end: end[0])[1]


def _starts(design_KRP: Array, log_L: Array) -> Iterator[Array]:
    """Least-squares fits of each term, for several divisions of the loss among the terms."""
    terms = len(design_KRP)
    if terms == 1:
        yield np.linalg.lstsq(design_KRP[0], log_L, rcond=None)[0]
        return
    loss = np.exp(log_L)
    for constant in _CONSTANTS:
        rest = loss - constant * loss.min()
        for first in _FIRSTS:
            parts = [np.log(first * rest), np.log((1 - first) * rest)]
            parts.append(np.full_like(rest, np.log(constant * loss.min())))
            # A term's design is 0 for the coefficients of other terms, whose solution is then 0.
            solved = zip(design_KRP, parts, strict=True)
            yield np.sum([np.linalg.lstsq(x, part, rcond=None)[0] for x, part in solved], axis=0)


def _basis(design_KRP: Array) -> Array:
    """A basis [P, P] in which the columns of each term are orthonormal: BFGS then needs fewer
    steps, because log N and log D are far from 0 and almost constant."""
    basis = np.eye(design_KRP.shape[2])
    for x_RP in design_KRP:
        own = np.flatnonzero(np.any(x_RP != 0, axis=0))
        _, upper = np.linalg.qr(x_RP[:, own])
        basis[np.ix_(own, own)] = np.linalg.inv(upper) * np.sqrt(len(x_RP))
    return basis


def _descend(
    design_KRP: Array, log_L: Array, weights: Array, basis: Array, start: Array
) -> tuple[float, Array]:
    """(objective, coefficients) of the optimum that BFGS reaches from a start."""
    from scipy.optimize import minimize  # takes 0.5 s of CPU time, which other reports need not

    terms, runs, number = design_KRP.shape
    flat = design_KRP.reshape(terms * runs, number) @ basis

    def objective(phi: Array) -> tuple[float, Array]:
        logs = (flat @ phi).reshape(terms, runs)
        total = np.logaddexp.reduce(logs, axis=0)
        residual = (total - log_L) / DELTA
        clipped = np.clip(residual, -1, 1)  # the Huber loss is clipped * (residual - clipped / 2)
        slope = weights * clipped / DELTA * np.exp(logs - total)
        return float(weights @ (clipped * (residual - clipped / 2))), slope.reshape(-1) @ flat

    # For at most nine coefficients BFGS is L-BFGS with the whole memory.  L-BFGS-B takes 2 to 4 ms
    # of CPU time per iteration in threaded LAPACK, BFGS 0.2 ms (2 shared cores, scipy 1.17.1).
    begin = np.linalg.solve(basis, start)
    options = {"gtol": 1e-7, "maxiter": 3000}
    end = minimize(objective, begin, jac=True, method="BFGS", options=options)
    return float(end.fun), basis @ end.x
