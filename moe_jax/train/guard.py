"""Which steps are refused: those that are not finite, or far above what was accepted before.

Everything here runs on the device, inside the train step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

WINDOW = 100  # accepted steps that a running mean remembers
LEAST = 20  # accepted steps before the means say what is usual

Guard = dict[str, jax.Array]


class Verdict(NamedTuple):
    """Why a step is refused; at most one of the two."""

    not_finite: Bool[Array, ""]
    spike: Bool[Array, ""]

    @property
    def accepted(self) -> Bool[Array, ""]:
        """Whether the state changes."""
        return ~(self.not_finite | self.spike)


def first_guard(dtype: DTypeLike, step: int = 0) -> Guard:
    """What the guard knows of a run that has `step` steps behind it, when it begins to look.

    `loss` and `grad_norm` are running means over `accepted` steps, `changed` is the last step that
    changed the parameters, and the last two count refused steps.
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
) -> Verdict:
    """The step's loss and gradient norm against their means; `factor` 0 compares nothing."""
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if not factor:
        return Verdict(~finite, jnp.zeros((), bool))
    far = (loss > factor * guard["loss"]) | (grad_norm > factor * guard["grad_norm"])
    return Verdict(~finite, finite & far & (guard["accepted"] >= LEAST))


def next_guard(
    guard: Guard,
    verdict: Verdict,
    loss: Float[Array, ""],
    grad_norm: Float[Array, ""],
    step: Int[Array, ""],
) -> Guard:
    """The guard after a step, which is number `step` counted from 1.

    Means are plain over the first WINDOW accepted steps and exponential from then on; refused steps
    never enter them.
    """
    accepted = verdict.accepted
    rate = 1 / jnp.minimum(guard["accepted"] + 1, WINDOW).astype(guard["loss"].dtype)

    def mean(old, value):
        return jnp.where(accepted, old + (value.astype(old.dtype) - old) * rate, old)

    return {
        "loss": mean(guard["loss"], loss),
        "grad_norm": mean(guard["grad_norm"], grad_norm),
        "accepted": guard["accepted"] + accepted,
        "changed": jnp.where(accepted, step, guard["changed"]),
        "not_finite": guard["not_finite"] + verdict.not_finite,
        "spikes": guard["spikes"] + verdict.spike,
    }
