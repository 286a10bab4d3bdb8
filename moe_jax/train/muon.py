"""Muon: the momentum of each matrix, orthogonalised; optax's, one matrix at a time.

Reference: Keller Jordan, https://kellerjordan.github.io/posts/muon/; Muon is Scalable for LLM
Training, arXiv 2502.16982, for the scale of an update.
"""

import math
from typing import Any

import jax.numpy as jnp
import optax

from moe_jax.nn.params import ParamRule

# Of x, x^3 and x^5 in each Newton-Schulz step (Dion, arXiv 2504.05295).  Every singular value of at
# least 0.003 of the matrix's Frobenius norm ends between 0.97 and 1.15; five steps of one triple,
# 3.4445, -4.775, 2.0315, leave them between 0.68 and 1.21.
NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
# Root mean square of an update's numbers before the learning rate: about that of AdamW's, whose
# rates and weight decay then serve both (arXiv 2502.16982, section 2.2).
UPDATE_RMS = 0.2
# Adam's, whatever their shape: one row of them is a token's, and no map of a hidden vector.
NOT_HIDDEN = ("embedding", "head", "norm")


def is_hidden_matrix(rule: ParamRule) -> bool:
    """True for parameters of which Muon makes the update; Adam makes that of all others."""
    return rule.sides is not None and rule.group not in NOT_HIDDEN


def scale_by_muon(
    sides: tuple[tuple[int, ...], tuple[int, ...]], momentum: float, dtype: str | None
) -> optax.GradientTransformation:
    """Gradient of one matrix -> its momentum with all singular values near 1, times a scale.

    The scale is UPDATE_RMS * sqrt(max(inputs, outputs)), by which matrices of every shape change
    by numbers of one size.

    Args:
      sides: axes of the parameter that count inputs, and those that count outputs.
      momentum: its decay per step; it is Nesterov's.
      dtype: of the momentum between steps; None: the parameter's.

    Returns:
      A transformation that keeps the momentum, in the parameter's shape, and a counter.
    """
    muon = optax.contrib.scale_by_muon(
        NEWTON_SCHULZ,
        len(NEWTON_SCHULZ),
        momentum,
        mu_dtype=dtype,
        weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(*sides),
    )

    # The coefficients, which optax has in the state, are no part of a checkpoint.
    def init(params: Any) -> Any:
        return muon.init(params)._replace(ns_coeffs=())

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        coefficients = jnp.asarray(NEWTON_SCHULZ, updates.dtype)
        direction: Any  # an array, as the parameter is
        direction, state = muon.update(updates, state._replace(ns_coeffs=coefficients), params)
        widest = max(math.prod(updates.shape[axis] for axis in side) for side in sides)
        return UPDATE_RMS * math.sqrt(widest) * direction, state._replace(ns_coeffs=())

    return optax.GradientTransformation(init, update)
