"""Muon, from optax, applied per matrix: updates by the orthogonalised momentum.

Reference: Keller Jordan, https://kellerjordan.github.io/posts/muon/; Muon is Scalable for LLM
Training, arXiv 2502.16982, for the scale of an update.
"""

import math
from typing import Any

import jax.numpy as jnp
import optax

from moe_jax.nn.params import ParamRule

# Coefficients of x, x^3 and x^5 per Newton-Schulz step (Dion, arXiv 2504.05295).  They bring each
# singular value of at least 0.003 of the Frobenius norm to between 0.97 and 1.15.  Five steps with
# one triple, 3.4445, -4.775, 2.0315, bring them only to between 0.68 and 1.21.
NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
# RMS of an update before the learning rate: about that of AdamW, so that one learning rate and one
# weight decay serve both (arXiv 2502.16982, section 2.2).
UPDATE_RMS = 0.2
# Updated by Adam whatever their shape: tables with one vector per token, and vectors.
NOT_HIDDEN = ("embedding", "head", "norm")


def is_hidden_matrix(rule: ParamRule) -> bool:
    """True for parameters that Muon updates; Adam updates all others."""
    return rule.sides is not None and rule.group not in NOT_HIDDEN


def scale_by_muon(
    sides: tuple[tuple[int, ...], tuple[int, ...]], momentum: float, dtype: str | None
) -> optax.GradientTransformation:
    """Make the Muon transformation of one matrix.

    The update is the momentum with all singular values near 1, times UPDATE_RMS *
    sqrt(max(inputs, outputs)), so that its RMS does not depend on the shape of the matrix.

    Args:
      sides: the input axes and the output axes of the parameter.
      momentum: decay of the Nesterov momentum per step.
      dtype: of the momentum between steps; None: that of the parameter.

    Returns:
      A transformation whose state is the momentum, in the parameter's shape, and a counter.
    """
    muon = optax.contrib.scale_by_muon(
        NEWTON_SCHULZ,
        len(NEWTON_SCHULZ),
        momentum,
        mu_dtype=dtype,
        weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(*sides),
    )

    # optax keeps the coefficients in the state; without them here no checkpoint holds them.
    def init(params: Any) -> Any:
        return muon.init(params)._replace(ns_coeffs=())

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        coefficients = jnp.asarray(NEWTON_SCHULZ, updates.dtype)
        direction: Any  # an array, as the parameter is
        direction, state = muon.update(updates, state._replace(ns_coeffs=coefficients), params)
        widest = max(math.prod(updates.shape[axis] for axis in side) for side in sides)
        return UPDATE_RMS * math.sqrt(widest) * direction, state._replace(ns_coeffs=())

    return optax.GradientTransformation(init, update)
