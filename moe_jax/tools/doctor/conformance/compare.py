"""Compares a layer's results with the oracle's, quantity by quantity."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from moe_jax.tools.doctor.conformance.oracle import Outcome

# A quantity whose largest element is smaller is compared with this scale: an expert without tokens
# has gradient zero.
LEAST_SCALE = 1e-4

# (platform, dtype of the layer) -> largest error allowed, relative to a quantity's largest
# element.  Weights and tokens are equal in every dtype, so only the arithmetic differs.
TOLERANCES = {
    # Measured over a pairwise covering subset: at most 1.6e-6 (in two cells
    # under JAX 0.12, 2.1e-6).
    ("cpu", "float32"): 1e-5,
    # Eight bits of mantissa, rounded after each expert's term of a sum: at most 1.5e-2.
    ("cpu", "bfloat16"): 6e-2,
    # XLA multiplies float32 experts in TF32, which has ten bits; routers use all 24.  Measured
    # on an H200, 32 cells on one device: at most 1.2e-3, and 1.5e-2 in bfloat16.
    ("gpu", "float32"): 5e-3,
    ("gpu", "bfloat16"): 6e-2,
    # Not measured.  XLA multiplies float32 experts in bfloat16.
    ("tpu", "float32"): 6e-2,
    ("tpu", "bfloat16"): 6e-2,
}


class Error(NamedTuple):
    """The error of one quantity."""

    quantity: str
    relative: float  # to its largest element; infinite for a count that differs


def errors(found: Outcome, right: Outcome) -> Iterator[Error]:
    """Compare every quantity, each expert separately, so that large values hide no small ones."""
    yield _close("output", found.y_BTD, right.y_BTD)
    yield _close("gradient of tokens", found.x_BTD, right.x_BTD)
    for name, gradient in right.params.items():
        if name.startswith("router_"):
            yield _close(f"gradient of {name}", found.params[name], gradient)
            continue
        for e in range(len(gradient)):
            what = f"gradient of {name}, expert {e}"
            yield _close(what, found.params[name][e], gradient[e])
    for name, value in right.losses.items():
        yield _close(name, found.losses[name], value)
    yield _equal("tokens counted", found.tokens, right.tokens)
    for axis, outcomes in right.outcomes.items():
        for outcome, counts in outcomes._asdict().items():
            yield _equal(f"{outcome} by {axis}", getattr(found.outcomes[axis], outcome), counts)
    yield _equal("assignments", found.assignments, right.assignments)
    yield _equal("lost tokens", found.lost_tokens, right.lost_tokens)


def worst(found: Outcome, right: Outcome) -> Error:
    """The largest of `errors`; a value that is not finite counts as infinite."""
    return max(errors(found, right), key=lambda error: error.relative)


def _close(quantity: str, found: Any, right: Any) -> Error:
    found, right = np.asarray(found, np.float64), np.asarray(right)
    if found.shape != right.shape:
        return Error(quantity, math.inf)
    scale = max(np.abs(right).max(initial=0), LEAST_SCALE)
    error = float(np.abs(found - right).max(initial=0) / scale)
    return Error(quantity, error if math.isfinite(error) else math.inf)


def _equal(quantity: str, found: Any, right: Any) -> Error:
    return Error(quantity, 0.0 if np.all(np.asarray(found) == np.asarray(right)) else math.inf)
