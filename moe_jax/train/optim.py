"""Optimizers and learning-rate schedules, from optax, by name."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax.decides import Training
from moe_jax.errors import UserError
from moe_jax.model.define import Params
from moe_jax.nn.params import ParamRule
from moe_jax.registry import lookup, suggest
from moe_jax.train import optax_by_name
from moe_jax.train.matrices import each

MOMENT_DTYPES = ("float32", "bfloat16", "param")
ADAM_KNOBS = ("b1", "b2", "eps", "moment_dtype")
Share = Callable[[jax.Array], jax.Array]  # step after the warm-up, a float from 0 -> of the peak


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Which optimizer, its knobs, and how the learning rate moves.

    A dotted name is a function of optax that makes a gradient transformation, called with
    `options`.  As with the other optimizers, gradients come clipped (`clip_norm`), and a parameter
    changes by -rate(step) * (direction + weight_decay * parameter).  The direction is what the
    transformation returns, or the negated update where the function takes a `learning_rate`, such
    as optax.sgd: it is then called with 1, and without weight decay of its own.

    Raises:
      UserError: an unknown name, options that the function does not take, or a value out of range.

    Reference: AdamW, arXiv 1711.05101; Adafactor, arXiv 1804.04235; the schedules cosine (SGDR,
    arXiv 1608.03983), wsd (MiniCPM, arXiv 2404.06395) and inverse_sqrt (T5, arXiv 1910.10683).
    """

    # adamw | adafactor, or the dotted name of a transformation, such as optax.scale_by_lion.
    name: Training[str] = "adamw"
    # Of a dotted name alone.
    options: Training[Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    learning_rate: Training[float] = 1e-3  # the peak
    b1: Training[float] = 0.9  # decay of Adam's first moment per step
    b2: Training[float] = 0.95  # decay of Adam's second moment per step
    eps: Training[float] = 1e-8  # added to the root of the second moment
    # Matrices only: norms, biases and other vectors are left out.
    weight_decay: Training[float] = 0.1
    clip_norm: Training[float] = 1.0  # global gradient norm; 0: no clipping
    # Adam's moments: param (as the weights) | float32 | bfloat16.
    moment_dtype: Training[str] = "param"
    schedule: Training[str] = "cosine"  # cosine | wsd | inverse_sqrt | constant
    warmup_steps: Training[int] = 20  # the last of them is the first step at the peak
    decay_share: Training[float] = 0.2  # wsd: the last share of the run, over which the rate falls
    final_share: Training[float] = 0.1  # of the peak, the rate of the last step (cosine, wsd)

    def __post_init__(self):
        self._check_name()
        lookup(SCHEDULES, self.schedule, "optimizer.schedule")
        if self.moment_dtype not in MOMENT_DTYPES:
            raise UserError(
                f"optimizer.moment_dtype is {self.moment_dtype!r}: "
                f"use one of {', '.join(MOMENT_DTYPES)}."
            )
        if self.name == "adafactor" and self.moment_dtype != "param":
            raise UserError(
                f"optimizer.moment_dtype is {self.moment_dtype!r}, which adafactor does not know: "
                f"set it to 'param', or use adamw."
            )
        if not self.learning_rate > 0:
            raise UserError(f"optimizer.learning_rate is {self.learning_rate}: set it above 0.")
        for name in ("weight_decay", "clip_norm", "warmup_steps", "final_share", "eps"):
            if getattr(self, name) < 0:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}: set 0 or more.")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}: set it in [0, 1).")
        if self.final_share > 1:
            raise UserError(
                f"optimizer.final_share is {self.final_share}, which is above the peak: set it in "
                f"[0, 1]."
            )
        if not 0 < self.decay_share <= 1:
            raise UserError(f"optimizer.decay_share is {self.decay_share}: set it in (0, 1].")

    @property
    def dotted(self) -> bool:
        """True if `name` names a transformation of optax."""
        return "." in self.name

    def _check_name(self) -> None:
        """Raises UserError for an unknown name, its options, and knobs that it would not read."""
        if self.dotted:
            optax_by_name.check_options(self.name, self.options)
            for field in dataclasses.fields(self):
                if field.name in ADAM_KNOBS and getattr(self, field.name) != field.default:
                    raise UserError(
                        f"optimizer.{field.name} is {getattr(self, field.name)!r}, which "
                        f"{self.name} does not read: set it back to {field.default!r} and give "
                        f"arguments in optimizer.options."
                    )
            return
        if self.name not in OPTIMIZERS:
            raise UserError(
                f"optimizer.name {self.name!r} is unknown{suggest(self.name, OPTIMIZERS)}: use one "
                f"of these, or a dotted name such as optax.scale_by_lion."
            )
        if self.options:
            raise UserError(
                f"optimizer.options is {dict(self.options)!r}, which {self.name} does not read: "
                f"set its own keys, such as optimizer.b1."
            )


def _fallen(step: jax.Array, first: int, last: int) -> jax.Array:
    """How far a fall from `first`, the last step at the peak, to `last` has come: 0 to 1."""
    return jnp.clip(1 - (last - step) / max(1, last - first), 0, 1)


def _cosine(config: OptimizerConfig, steps: int) -> Share:
    """Half a cosine down to final_share (SGDR, arXiv 1608.03983, without restarts)."""
    final, first = config.final_share, max(0, config.warmup_steps - 1)

    def share(step):
        return final + (1 - final) * (1 + jnp.cos(jnp.pi * _fallen(step, first, steps - 1))) / 2

    return share


def _decay_steps(config: OptimizerConfig, steps: int) -> int:
    """Steps of the fall of `wsd`."""
    return max(1, round(steps * config.decay_share))


def _wsd(config: OptimizerConfig, steps: int) -> Share:
    """Warm-up, constant, linear decay (MiniCPM, arXiv 2404.06395)."""
    first = max(0, steps - 1 - _decay_steps(config, steps))
    return lambda step: 1 - (1 - config.final_share) * _fallen(step, first, steps - 1)


def _inverse_sqrt(config: OptimizerConfig, steps: int) -> Share:
    """Peak * sqrt(warmup / step) after the warm-up, steps from 1 (T5, arXiv 1910.10683)."""
    return lambda step: jnp.sqrt(max(1, config.warmup_steps) / (step + 1))


def _constant(config: OptimizerConfig, steps: int) -> Share:
    return jnp.ones_like


SCHEDULES: dict[str, Callable[[OptimizerConfig, int], Share]] = {
    "cosine": _cosine,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
    "constant": _constant,
}


def make_schedule(config: OptimizerConfig, steps: int) -> Callable[[Any], jax.Array]:
    """The learning rate of each step.

    Warm-up is linear: step s of `warmup_steps` = W has (s + 1) / W of the peak, so the first step
    already learns and step W - 1 has the peak.  `cosine` and `wsd` have final_share of the peak in
    step `steps` - 1, and from there on.  A run that goes on with another number of steps has the
    rates of that number from its next step on.

    Args:
      config: the knobs.
      steps: length of the run, train.steps.

    Returns:
      A function of the step, counted from 0.

    Raises:
      UserError: the run is too short for the warm-up and the fall.
    """
    after = lookup(SCHEDULES, config.schedule, "optimizer.schedule")(config, steps)
    _check_length(config, steps)

    def rate(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.result_type(float))
        share = after(step)
        if config.warmup_steps:
            rise = (step + 1) / config.warmup_steps
            share = jnp.where(step < config.warmup_steps, rise, share)
        return config.learning_rate * share

    return rate


def _check_length(config: OptimizerConfig, steps: int) -> None:
    """Raises UserError where a run cannot reach the peak of its rate, or final_share after it."""
    warmup = config.warmup_steps
    if warmup > steps:
        raise UserError(
            f"optimizer.warmup_steps is {warmup}, more than train.steps ({steps}), so the "
            f"learning rate would not reach its peak: set it below {steps}, or raise train.steps."
        )
    if config.schedule == "cosine" and config.final_share < 1 and warmup == steps:
        raise UserError(
            f"optimizer.warmup_steps is {warmup}, all of train.steps, which leaves no step for "
            f"the fall to optimizer.final_share: set it below {steps}, or raise train.steps."
        )
    if config.schedule == "wsd" and warmup + _decay_steps(config, steps) > steps:
        raise UserError(
            f"optimizer.warmup_steps ({warmup}) and optimizer.decay_share ({config.decay_share}, "
            f"{_decay_steps(config, steps)} steps) are more than train.steps ({steps}): lower one "
            f"of them, or raise train.steps."
        )


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """optax's Adam with both moments stored in `moment_dtype`; the arithmetic is the weights'."""
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.moment_dtype == "param":
        return adam

    def cast(state, dtype):
        return state._replace(mu=state.mu.astype(dtype), nu=state.nu.astype(dtype))

    def init(params: Any) -> Any:
        return cast(adam.init(params), config.moment_dtype)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        direction, state = adam.update(updates, cast(state, updates.dtype), params)
        return direction, cast(state, config.moment_dtype)

    return optax.GradientTransformation(init, update)


def _adamw(config: OptimizerConfig) -> list[optax.GradientTransformation]:
    return [_adam(config)]


def _adafactor(config: OptimizerConfig) -> list[optax.GradientTransformation]:
    """Factored second moments (Shazeer and Stern, arXiv 1804.04235), without relative steps."""
    del config
    return [
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),  # the rate is relative to each weight's size, as in T5
    ]


# Name -> the transformations that turn a gradient into a direction, without weight decay.
OPTIMIZERS = {"adamw": _adamw, "adafactor": _adafactor}
# Those that look at each number alone: to them it is all one which matrix a number belongs to.
ELEMENTWISE = ("adamw",)


def _transformation(
    config: OptimizerConfig, decay: bool, given: optax.GradientTransformation | None
) -> optax.GradientTransformation:
    """Gradient -> direction for one parameter of one layer, weight decay included."""
    if given is not None:
        direction = [given]
    elif config.dotted:
        direction = optax_by_name.directions(config.name, config.options)
    else:
        direction = OPTIMIZERS[config.name](config)
    # A mask, and not two kinds of chain: checkpoints have one form of state for all parameters.
    weight_decay = optax.add_decayed_weights(config.weight_decay, mask=lambda _: decay)
    return optax.chain(*direction, weight_decay)


class Optimizer:
    """An update rule applied to one matrix of one layer at a time (`ParamRule.matrices`).

    Stacked layers, experts and an expert's gate and up are mapped over.  So a rule that looks at a
    whole matrix (Adafactor) does the same to scanned layers as to unrolled ones and to an expert
    whatever the others are, and the state of a parameter has the parameter's layout: it is stacked
    and sharded with it.

    Gradients come clipped, and the learning rate is a function of the step: the rule has neither.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        steps: int,
        *,
        frozen: tuple[str, ...] = (),
        transformation: optax.GradientTransformation | None = None,
    ):
        """Binds what does not change during a run.

        Args:
          config: the knobs.
          steps: length of the run, for the schedule.
          frozen: groups of parameters that never change (`ParamRule.group`).
          transformation: in place of the one that `config.name` names; None: that one.  It turns
            a gradient into a direction, as optax's `scale_by_*` do: a parameter changes by
            -rate(step) * (direction + weight_decay * parameter).

        Raises:
          UserError: a run too short for the warm-up and the fall of the learning rate.
        """
        self.schedule = make_schedule(config, steps)
        self._config, self._frozen, self._given = config, frozen, transformation
        self._by_decay = {
            decay: _transformation(config, decay, transformation) for decay in (False, True)
        }

    def init(self, params: Params, rules: Params) -> Params:
        """The state before the first step.

        Args:
          params: the parameters.
          rules: a tree like theirs with the `ParamRule` of each (`ModelDef.rules`).

        Returns:
          The tree of `params` with the update rule's state in place of each leaf.

        Raises:
          UserError: a transformation of optax that cannot be applied to one of them.
        """
        if self._config.dotted or self._given is not None:
            self._check(params, rules)
        return jax.tree.map(lambda rule, param: self._of(rule).init(param), rules, params)

    def update(
        self, gradients: Params, state: Params, params: Params, rules: Params, step: jax.Array
    ) -> tuple[Params, Params]:
        """Take one step.

        Args:
          gradients: a tree like the parameters, clipped.
          state: of `init`, or of the step before.
          params: the parameters.
          rules: as `init` got them.
          step: int32 scalar, counted from 0, which decides the learning rate.

        Returns:
          New parameters and new state; those of frozen groups as they were.
        """
        rate = self.schedule(step)

        def one(rule, param, gradient, state):
            if rule.group in self._frozen:
                return param, state
            direction: Any
            direction, state = self._of(rule).update(gradient, state, param)
            return param - (rate * direction).astype(param.dtype), state

        pairs = jax.tree.map(one, rules, params, gradients, state)
        outer = jax.tree.structure(params)
        flat = outer.flatten_up_to(pairs)
        return outer.unflatten([p for p, _ in flat]), outer.unflatten([s for _, s in flat])

    def _check(self, params: Params, rules: Params) -> None:
        """Raises UserError as `init` does; parameters of one shape are checked once."""
        leaves = zip(jax.tree.leaves(rules), jax.tree.leaves_with_path(params), strict=True)
        paths = {}
        for rule, (path, param) in leaves:
            paths.setdefault((rule.matrix_shape(param.shape), param.dtype), path)
        for (shape, dtype), path in paths.items():
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            parameter = jax.ShapeDtypeStruct(shape, dtype)
            if self._given is not None:
                optax_by_name.check_state(self._given, name, parameter)
            else:
                config = self._config
                optax_by_name.check_parameter(config.name, config.options, name, parameter)

    def _of(self, rule: ParamRule) -> optax.GradientTransformation:
        """What updates a parameter with this rule, of all stacked layers at once."""
        one_layer = self._by_decay[rule.decay]
        if self._given is not None or self._config.name not in ELEMENTWISE:
            for outer, axis in reversed(list(enumerate(rule.matrices))):
                one_layer = each(one_layer, axis - outer - rule.stacked)
        if not rule.stacked:
            return one_layer
        return optax.GradientTransformation(jax.vmap(one_layer.init), jax.vmap(one_layer.update))
