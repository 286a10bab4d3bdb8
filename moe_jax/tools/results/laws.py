"""Scaling laws as functions of arrays: the loss of runs by parameters, experts and tokens.

N active parameters outside embedding table and head, Ê effective experts, D training tokens, L
held-out loss in nats per token; R runs, K terms, P coefficients.  Here E is num_experts / K (K
assignments per token), not the number of experts; in the chinchilla formula it is the constant.

The loss of each law is a sum of K terms, and the log of a term is linear in its own coefficients.
So log L is the logsumexp over K of design_KRP @ coefficients_P.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.errors import UserError

Array = np.ndarray
_LN10 = float(np.log(10.0))


class Saturation(NamedTuple):
    """The bounds of effective experts, by default Clark's for S-BASE routing (`S_BASE`).

    Reference: Clark et al., arXiv 2202.01169, equation 1 and table 3.
    """

    start: float = 1.847  # Ê of E = 1
    maximum: float = 314.478  # Ê in the limit of many experts


S_BASE = Saturation()


@dataclasses.dataclass(frozen=True)
class Law:
    """A scaling law.

    Attributes:
      name: as in --fit.
      formula: in the letters of this module.
      terms: for each term, the names of its coefficients.
      factors: names of the coefficients that are reported as exp of the fitted number.
      features: (log N, log Ê, log D), each [R], -> for each term, its features: [R] each.
      least: letter that the law varies -> the number of different values that it needs at least.
      crossed: the letters that must vary at every size, for messages.
      one_horizon: True: all runs must have the same D.
    """

    name: str
    formula: str
    terms: tuple[tuple[str, ...], ...]
    factors: tuple[str, ...]
    features: Callable[[Array, Array, Array], Sequence[Sequence[Array]]]
    least: dict[str, int]
    crossed: str
    one_horizon: bool = False

    @property
    def coefficients(self) -> tuple[str, ...]:
        """The names of all coefficients, in the order of the terms."""
        return tuple(name for term in self.terms for name in term)


def effective_experts(experts: Array, saturation: Saturation) -> Array:
    """Compute Ê with 1/Ê = 1/(E - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max.

    Args:
      experts: E >= 1, float [R].
      saturation: E_start and E_max.

    Returns:
      Ê, float [R]: E_start for E = 1, below E_max for every E.

    Raises:
      UserError: not 0 < E_start < E_max.

    Reference: Clark et al., arXiv 2202.01169, equation 1.
    """
    start, maximum = saturation
    if not 0 < start < maximum < float("inf"):
        raise UserError(
            f"--fit_e_start={start:g} and --fit_e_max={maximum:g}: E_start must be above 0 and "
            f"below E_max. Leave both out for {S_BASE.start} and {S_BASE.maximum}."
        )
    shifted = experts - 1 + 1 / (1 / start - 1 / maximum)
    return 1 / (1 / shifted + 1 / maximum)


def design(law: Law, n: Array, e: Array, d: Array, saturation: Saturation) -> Array:
    """Compute the design of a law.

    Args:
      law: the law.
      n: active parameters N, float [R].
      e: E = num_experts / assignments per token, float [R].
      d: tokens D, float [R].
      saturation: E_start and E_max.

    Returns:
      Float [K, R, P]: log of term k = design[k] @ coefficients; 0 for coefficients of other terms.

    Raises:
      UserError: not 0 < E_start < E_max.
    """
    terms = law.features(np.log(n), np.log(effective_experts(e, saturation)), np.log(d))
    found = np.zeros((len(terms), len(n), len(law.coefficients)))
    place = 0
    for number, features in enumerate(terms):
        for feature in features:
            found[number, :, place] = feature
            place += 1
    return found


def log_loss(design_KRP: Array, coefficients_P: Array) -> Array:
    """Compute log L, float [R]."""
    return np.logaddexp.reduce(design_KRP @ coefficients_P, axis=0)


def _chinchilla(log_n: Array, log_e: Array, log_d: Array) -> Sequence[Sequence[Array]]:
    one = np.ones_like(log_n)
    return (one, -log_n), (one, -log_d), (one,)


def _clark(log_n: Array, log_e: Array, log_d: Array) -> Sequence[Sequence[Array]]:
    """With a factor, because the coefficients are those of log10 L by log10 N and log10 Ê."""
    one = np.ones_like(log_n)
    return ((log_n, log_e, log_n * log_e / _LN10, one * _LN10),)


def _joint(log_n: Array, log_e: Array, log_d: Array) -> Sequence[Sequence[Array]]:
    one = np.ones_like(log_n)
    by_n = (one, log_e, log_n, log_n * log_e)
    by_d = (one, log_e, log_d, log_d * log_e)
    return by_n, by_d, (one,)


LAWS = {
    # Clark et al., arXiv 2202.01169, equation 1; log is to base 10.
    "clark": Law(
        "clark",
        "log10 L = a log10 N + b log10 Ê + c log10 N log10 Ê + d",
        (("a", "b", "c", "d"),),
        (),
        _clark,
        {"N": 2, "E": 2},
        "E",
        one_horizon=True,
    ),
    # Ludziejewski et al., arXiv 2502.05172.
    "joint": Law(
        "joint",
        "L = a Ê^delta N^(alpha + gamma ln Ê) + b Ê^omega D^(beta + zeta ln Ê) + c",
        (("a", "delta", "alpha", "gamma"), ("b", "omega", "beta", "zeta"), ("c",)),
        ("a", "b", "c"),
        _joint,
        {"N": 3, "E": 2, "D": 3},
        "E and D",
    ),
    # Hoffmann et al., arXiv 2203.15556, equation 2 (approach 3); E is the constant of the law.
    "chinchilla": Law(
        "chinchilla",
        "L = A / N^alpha + B / D^beta + E",
        (("A", "alpha"), ("B", "beta"), ("E",)),
        ("A", "B", "E"),
        _chinchilla,
        {"N": 3, "D": 3},
        "D",
    ),
}
