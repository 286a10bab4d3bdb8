"""The step guard: skips steps that are not finite, or far above the running means.

Everything here runs on the device, inside the train step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

WINDOW = 100  # accepted steps that a running mean covers
MIN_ACCEPTED = 20  # accepted steps before the means are used

Guard = dict[str, jax.Array]


class GuardDecision(NamedTuple):
    """The reason why a step is skipped; at most one of the two is true."""

    not_finite: Bool[Array, ""]
    spike: Bool[Array, ""]

    @property
    def accepted(self) -> Bool[Array, ""]:
        """True if the step is not skipped, so that the state changes."""
        return ~(self.not_finite | self.spike)


def first_guard(dtype: DTypeLike, step: int = 0) -> Guard:
    """Make the guard's initial state, with no accepted steps, for a run that continues at `step`.

    `loss` and `grad_norm` are running means over `accepted` steps, `changed` is the last step that
    changed the parameters, and `not_finite` and `spikes` count skipped steps.
    """
    zero, none = jnp.zeros((), dtype), jnp.zeros((), jnp.int32)
    return {
        "loss": zero,
        "grad_norm": zero,
        "accepted": none,
        "changed": jnp.asarray(step, jnp.int32),
        "not_finite": none,
        "spikes": none,
    }


def judge(
    guard: Guard, loss: Float[Array, ""], grad_norm: Float[Array, ""], factor: float
) -> GuardDecision:
    """Compare loss and gradient norm with their running means.

    Args:
      guard: before the step.
      loss: of the step.
      grad_norm: of the step, before clipping.
      factor: a spike is more than this many times the mean; 0: finite steps are always accepted.

    Returns:
      The decision: accepted, or the reason to skip the step.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if not factor:
        return GuardDecision(~finite, jnp.zeros((), bool))
    far = (loss > factor * guard["loss"]) | (grad_norm > factor * guard["grad_norm"])
    return GuardDecision(~finite, finite & far & (guard["accepted"] >= MIN_ACCEPTED))


def next_guard(
    guard: Guard,
    decision: GuardDecision,
    loss: Float[Array, ""],
    grad_norm: Float[Array, ""],
    step: Int[Array, ""],
) -> Guard:
    """Compute the guard after `step` (1-based).

    Running means are arithmetic over the first WINDOW accepted steps and exponential after them.
    Skipped steps do not enter the means.
    """
    accepted = decision.accepted
    rate = 1 / jnp.minimum(guard["accepted"] + 1, WINDOW).astype(guard["loss"].dtype)

    def mean(old, value):
        return jnp.where(accepted, old + (value.astype(old.dtype) - old) * rate, old)

    return {
        "loss": mean(guard["loss"], loss),
        "grad_norm": mean(guard["grad_norm"], grad_norm),
        "accepted": guard["accepted"] + accepted,
        "changed": jnp.where(accepted, step, guard["changed"]),
        "not_finite": guard["not_finite"] + decision.not_finite,
        "spikes": guard["spikes"] + decision.spike,
    }
