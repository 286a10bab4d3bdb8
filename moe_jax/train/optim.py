"""Optimizers and learning-rate schedules, from optax, by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax.errors import UserError
from moe_jax.nn.params import ParamRule
from moe_jax.registry import lookup, suggest
from moe_jax.train import optax_by_name

MOMENT_DTYPES = ("float32", "bfloat16", "param")
ADAM_KNOBS = ("b1", "b2", "eps", "moment_dtype")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Which optimizer, its knobs, and how the learning rate moves.

    A dotted name is a function of optax that makes a gradient transformation, called with
    `options`.  As with the other optimizers, gradients come clipped (`clip_norm`), and a parameter
    changes by -rate(step) * (direction + weight_decay * parameter).  The direction is what the
    transformation returns, or the negated update where the function takes a `learning_rate`, such
    as optax.sgd: it is then called with 1, and without weight decay of its own.
    """

    # adamw | adafactor, or the dotted name of a transformation, such as optax.scale_by_lion.
    name: str = "adamw"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of a dotted name alone
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
    """An update rule applied to one parameter of one layer at a time.

    Stacked layers are mapped over, so a rule that looks at a whole matrix (Adafactor) does the same
    to scanned layers as to unrolled ones, and the state of a parameter has the parameter's layout:
    it is stacked and sharded with it.

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
          transformation: in place of the one that `config.name` names.  It turns a gradient into
            a direction, as optax's `scale_by_*` do: a parameter changes by
            -rate(step) * (direction + weight_decay * parameter).
        """
        self.schedule = make_schedule(config, steps)
        self._config, self._frozen, self._given = config, frozen, transformation
        self._by_decay = {
            decay: _transformation(config, decay, transformation) for decay in (False, True)
        }

    def init(self, params: Any, rules: Any) -> Any:
        """State: the tree of `params` with the rule's state in place of each leaf.

        Args:
          params: the parameters.
          rules: a tree like theirs with the `ParamRule` of each (`ModelDef.rules`).

        Raises:
          UserError: a transformation of optax that cannot be applied to one of them.
        """
        if self._config.dotted or self._given is not None:
            self._check(params, rules)
        return jax.tree.map(lambda rule, param: self._of(rule).init(param), rules, params)

    def update(
        self, gradients: Any, state: Any, params: Any, rules: Any, step: jax.Array
    ) -> tuple[Any, Any]:
        """New parameters and state after `step` (from 0); `rules` as `init` got them."""
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

    def _check(self, params: Any, rules: Any) -> None:
        """Raises UserError as `init` does; parameters of one shape are checked once."""
        leaves = zip(jax.tree.leaves(rules), jax.tree.leaves_with_path(params), strict=True)
        paths = {}
        for rule, (path, param) in leaves:
            paths.setdefault((param.shape[rule.stacked :], param.dtype), path)
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
        if not rule.stacked:
            return one_layer
        return optax.GradientTransformation(jax.vmap(one_layer.init), jax.vmap(one_layer.update))
