"""Optimizers and learning-rate schedules, from optax, by name."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax.errors import UserError
from moe_jax.registry import lookup

MOMENT_DTYPES = ("float32", "bfloat16", "param")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Which optimizer, its knobs, and how the learning rate moves."""

    name: str = "adamw"  # adamw | adafactor
    learning_rate: float = 1e-3  # the peak
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # matrices only: norms, biases and other vectors are left out
    clip_norm: float = 1.0  # global gradient norm; 0: no clipping
    moment_dtype: str = "param"  # Adam's moments: param (as the weights) | float32 | bfloat16
    schedule: str = "cosine"  # cosine | wsd | inverse_sqrt | constant
    warmup_steps: int = 20
    decay_share: float = 0.2  # wsd: the last share of the run, over which the rate falls
    final_share: float = 0.1  # of the peak, reached at the end (cosine, wsd)

    def __post_init__(self):
        lookup(OPTIMIZERS, self.name, "optimizer.name")
        lookup(SCHEDULES, self.schedule, "optimizer.schedule")
        if self.moment_dtype not in MOMENT_DTYPES:
            raise UserError(
                f"optimizer.moment_dtype is {self.moment_dtype!r}: "
                f"use one of {', '.join(MOMENT_DTYPES)}."
            )
        if not self.learning_rate > 0:
            raise UserError(f"optimizer.learning_rate is {self.learning_rate}: set it above 0.")
        for name in ("weight_decay", "clip_norm", "warmup_steps", "final_share", "eps"):
            if getattr(self, name) < 0:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}: set 0 or more.")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}: set it in [0, 1).")
        if not 0 < self.decay_share <= 1:
            raise UserError(f"optimizer.decay_share is {self.decay_share}: set it in (0, 1].")


def _warmup(config: OptimizerConfig, rest: optax.Schedule) -> optax.Schedule:
    """Linear from 0 to the peak, then `rest` counted from there."""
    if not config.warmup_steps:
        return rest
    rise = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([rise, rest], [config.warmup_steps])


def _cosine(config: OptimizerConfig, steps: int) -> optax.Schedule:
    after = max(1, steps - config.warmup_steps)
    fall = optax.cosine_decay_schedule(config.learning_rate, after, config.final_share)
    return _warmup(config, fall)


def _wsd(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Warm-up, constant, linear decay (MiniCPM, arXiv 2404.06395)."""
    decay = max(1, round(steps * config.decay_share))
    flat = max(0, steps - decay - config.warmup_steps)
    peak = config.learning_rate
    fall = optax.linear_schedule(peak, peak * config.final_share, decay)
    return _warmup(config, optax.join_schedules([optax.constant_schedule(peak), fall], [flat]))


def _inverse_sqrt(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Peak * sqrt(warmup / step) after the warm-up (T5, arXiv 1910.10683)."""
    start = max(1, config.warmup_steps)

    def fall(count):
        return config.learning_rate * jnp.sqrt(start / (start + count))

    return _warmup(config, fall)


def _constant(config: OptimizerConfig, steps: int) -> optax.Schedule:
    return _warmup(config, optax.constant_schedule(config.learning_rate))


SCHEDULES = {
    "cosine": _cosine,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
    "constant": _constant,
}


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step -> learning rate, for a run of `steps` steps."""
    return lookup(SCHEDULES, config.schedule, "optimizer.schedule")(config, steps)


def decay_mask(params: Any) -> Any:
    """True for matrices, False for vectors (norm weights, biases).

    A leaf's own rank decides, so leaves stacked over layers count one axis less: their tree says
    `stack` above them.
    """

    def is_matrix(path, leaf):
        stacked = any(getattr(key, "key", None) == "stack" for key in path)
        return leaf.ndim - stacked >= 2

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """optax's Adam with both moments in `moment_dtype`; the update itself in the weights' dtype."""
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.moment_dtype == "param":
        return adam
    dtype = jnp.dtype(config.moment_dtype)

    def store(state):
        return state._replace(
            mu=jax.tree.map(lambda m: m.astype(dtype), state.mu),
            nu=jax.tree.map(lambda n: n.astype(dtype), state.nu),
        )

    def init(params):
        return store(adam.init(params))

    def update(updates, state, params=None):
        wide = state._replace(
            mu=jax.tree.map(lambda m, g: m.astype(g.dtype), state.mu, updates),
            nu=jax.tree.map(lambda n, g: n.astype(g.dtype), state.nu, updates),
        )
        updates, state = adam.update(updates, wide, params)
        return updates, store(state)

    return optax.GradientTransformation(init, update)


def _adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.chain(
        scale_by_adam(config), optax.add_decayed_weights(config.weight_decay, mask=decay_mask)
    )


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
    """Factored second moments (Shazeer and Stern, arXiv 1804.04235), without relative steps."""
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    )


OPTIMIZERS = {"adamw": _adamw, "adafactor": _adafactor}


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The update rule, learning rate included; gradients are clipped by the train step.

    The step clips because the norm is reported anyway and one pass over the gradients is enough.
    """
    rule = lookup(OPTIMIZERS, config.name, "optimizer.name")(config)
    return optax.chain(rule, optax.scale_by_learning_rate(make_schedule(config, steps)))
