"""Learning-rate schedules, by name.

The decay's end and duration (`fall_of`) depend on the length of the run.  They are an array, not
constants, so that one compiled train step serves runs of any length.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import UserError
from moe_jax.registry import lookup

# (step from 0 as a float, array of `fall_of`) -> fraction of the peak rate, after the warm-up.
Share = Callable[[jax.Array, Any], jax.Array]
Schedule = Callable[..., jax.Array]


class Knobs(Protocol):
    """The fields of `OptimizerConfig` that a schedule reads; documented there."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def schedule(self) -> str: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def decay_share(self) -> float: ...
    @property
    def final_share(self) -> float: ...


def _fallen(step: jax.Array, fall: Any) -> jax.Array:
    """The progress of the decay: 0 at the last step of the peak, 1 at the last step of the run."""
    return jnp.clip(1 - (fall[0] - step) * fall[1], 0, 1)


def _cosine(config: Knobs) -> Share:
    """Half a cosine down to final_share (SGDR, arXiv 1608.03983, without restarts)."""
    final = config.final_share
    return lambda step, fall: final + (1 - final) * (1 + jnp.cos(jnp.pi * _fallen(step, fall))) / 2


def _wsd(config: Knobs) -> Share:
    """Warm-up, constant, linear decay (MiniCPM, arXiv 2404.06395)."""
    return lambda step, fall: 1 - (1 - config.final_share) * _fallen(step, fall)


def _inverse_sqrt(config: Knobs) -> Share:
    """Peak * sqrt(warmup / step) after the warm-up, with 1-based steps (T5, arXiv 1910.10683)."""
    return lambda step, fall: jnp.sqrt(max(1, config.warmup_steps) / (step + 1))


def _constant(config: Knobs) -> Share:
    return lambda step, fall: jnp.ones_like(step)


SCHEDULES: dict[str, Callable[[Knobs], Share]] = {
    "cosine": _cosine,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
    "constant": _constant,
}


def fall_of(config: Knobs, steps: int) -> np.ndarray:
    """Compute the decay's end and duration from the length of the run.

    Args:
      config: hyperparameters of the schedule.
      steps: length of the run, train.steps.

    Returns:
      Float [2]: the last step, from 0, and 1 / the number of steps of the decay to final_share
      (`cosine` and `wsd`; the other schedules do not use it).  It is the inverse because steps are
      multiplied by it, as XLA does in place of dividing by a constant.
    """
    if config.schedule == "wsd":
        first = max(0, steps - 1 - _decay_steps(config, steps))
    else:
        first = max(0, config.warmup_steps - 1)
    dtype = jnp.result_type(float)
    return np.asarray([steps - 1, np.ones((), dtype) / max(1, steps - 1 - first)], dtype)


def make_schedule(config: Knobs, steps: int) -> Schedule:
    """Make the function from step to learning rate.

    Warm-up is linear: with `warmup_steps` = W, step s has (s + 1) / W of the peak rate, so the
    first step already learns and step W - 1 has the peak.  `cosine` and `wsd` reach final_share of
    the peak in step `steps` - 1 and keep it.  A run resumed with a different number of steps has
    the rates of the new number from its next step on.

    Args:
      config: hyperparameters of the schedule.
      steps: length of the run, train.steps.

    Returns:
      A function of the step, from 0, and optionally of `fall_of` for a different length; its
      default is that of `steps`.

    Raises:
      UserError: the run is too short for the warm-up and the decay.
    """
    after = lookup(SCHEDULES, config.schedule, "optimizer.schedule")(config)
    _check_length(config, steps)
    own = fall_of(config, steps)

    def rate(step: Any, fall: Any = own) -> jax.Array:
        step = jnp.asarray(step, jnp.result_type(float))
        share = after(step, fall)
        if config.warmup_steps:
            rise = (step + 1) / config.warmup_steps
            share = jnp.where(step < config.warmup_steps, rise, share)
        return config.learning_rate * share

    return rate


def _decay_steps(config: Knobs, steps: int) -> int:
    """The number of steps of the decay of `wsd`."""
    return max(1, round(steps * config.decay_share))


def _check_length(config: Knobs, steps: int) -> None:
    """Raise UserError if the run cannot reach the peak rate, or final_share after it."""
    warmup = config.warmup_steps
    if warmup > steps:
        raise UserError(
            f"config.optimizer.warmup_steps is {warmup}, more than train.steps ({steps}): the "
            f"learning rate would not reach its peak. Set it below {steps}, or raise train.steps."
        )
    if config.schedule == "cosine" and config.final_share < 1 and warmup == steps:
        raise UserError(
            f"config.optimizer.warmup_steps is {warmup}, equal to train.steps: no step is left for "
            f"the decay to optimizer.final_share. Set it below {steps}, or raise train.steps."
        )
    if config.schedule == "wsd" and warmup + _decay_steps(config, steps) > steps:
        raise UserError(
            f"config.optimizer.warmup_steps ({warmup}) and optimizer.decay_share "
            f"({config.decay_share}, {_decay_steps(config, steps)} steps) are more than "
            f"train.steps ({steps}). Lower one of them, or raise train.steps."
        )
