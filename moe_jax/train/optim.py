"""The optimizer: its config, the update rules by name, and their application per matrix."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import optax

from moe_jax import bounds
from moe_jax.bounds import Choice, above, at_least, one_of, within
from moe_jax.decides import Training
from moe_jax.errors import UserError
from moe_jax.model.define import Params
from moe_jax.nn.params import GROUPS, ParamRule
from moe_jax.registry import suggest
from moe_jax.train import optax_by_name
from moe_jax.train.matrices import each
from moe_jax.train.muon import is_hidden_matrix, scale_by_muon
from moe_jax.train.schedule import SCHEDULES, fall_of, make_schedule

MOMENT_DTYPES = ("float32", "bfloat16", "param")
RULES = Choice(
    lambda: OPTIMIZERS, "a dotted name such as optax.scale_by_lion", lambda name: "." in name
)
ADAM_KNOBS = ("b1", "b2", "eps", "moment_dtype")
RATE_OF: dict[str, float] = dict.fromkeys(GROUPS, 1.0)
DECAY_OF: dict[str, float] = RATE_OF | {"norm": 0.0}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update rule, its hyperparameters and the learning-rate schedule.

    A dotted name is a function of optax that makes a gradient transformation, called with
    `options`.  As with the other optimizers, gradients are clipped first (`clip_norm`), and a
    parameter changes by -rate(step) * (direction + weight_decay * parameter), with the factors of
    its group on both (`rate_of`, `decay_of`).  The direction is what the transformation returns.
    If the function takes a `learning_rate`, as optax.sgd does, it is called with learning rate 1
    and weight decay 0, and the direction is the negated update.

    Raises:
      UserError: an unknown name, options that the function does not take, or a value out of range.

    Reference: AdamW, arXiv 1711.05101; Adafactor, arXiv 1804.04235; Muon, arXiv 2502.16982; the
    schedules cosine (SGDR, arXiv 1608.03983), wsd (MiniCPM, arXiv 2404.06395) and inverse_sqrt (T5,
    arXiv 1910.10683).
    """

    # The update rule; with muon, Adam updates vectors, the embedding and the head.
    name: Training[Annotated[str, RULES]] = "adamw"
    # Keyword arguments, if `name` is a function of optax.
    options: Training[Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    learning_rate: Training[Annotated[float, above(0)]] = 1e-3  # the peak of the schedule
    # Decay of Adam's first moment per step.
    b1: Training[Annotated[float, within("[0, 1)")]] = 0.9
    # Decay of Adam's second moment per step.
    b2: Training[Annotated[float, within("[0, 1)")]] = 0.95
    # Added to the root of Adam's second moment.
    eps: Training[Annotated[float, at_least(0)]] = 1e-8
    # muon: decay of a matrix's momentum per step.
    momentum: Training[Annotated[float, within("[0, 1)")]] = 0.95
    # Fraction of a parameter subtracted per step, times the learning rate and the group's factor in
    # `decay_of`.
    weight_decay: Training[Annotated[float, at_least(0)]] = 0.1
    # Group of parameters -> factor on weight_decay; norm includes all vectors, such as biases.  A
    # group that is not set has its default, here and in rate_of.
    decay_of: Training[Mapping[str, float]] = dataclasses.field(default_factory=DECAY_OF.copy)
    # Group of parameters -> factor on the learning rate; 0: the group is not trained.
    rate_of: Training[Mapping[str, float]] = dataclasses.field(default_factory=RATE_OF.copy)
    # Gradients are scaled down to this global norm; 0: no clipping.
    clip_norm: Training[Annotated[float, at_least(0)]] = 1.0
    # Storage dtype of the moments of Adam and Muon; param: that of the weights.
    moment_dtype: Training[Annotated[str, one_of(MOMENT_DTYPES)]] = "param"
    # Shape of the learning rate after the warm-up.
    schedule: Training[Annotated[str, Choice(lambda: SCHEDULES)]] = "cosine"
    # Steps of linear warm-up; the last of them is the first step at the peak.
    warmup_steps: Training[Annotated[int, at_least(0)]] = 20
    # Fraction of the run, at its end, over which the rate falls (schedule wsd).
    decay_share: Training[Annotated[float, within("(0, 1]")]] = 0.2
    # Learning rate of the last step, as a fraction of the peak (schedules cosine and wsd).
    final_share: Training[Annotated[float, within("[0, 1]")]] = 0.1

    def __post_init__(self):
        bounds.check(self, "optimizer.")
        self._check_name()
        if self.name == "adafactor" and self.moment_dtype != "param":
            raise UserError(
                f"config.optimizer.moment_dtype is {self.moment_dtype!r}: adafactor does not "
                f"support it. Set 'param', or use adamw."
            )
        for name, default in (("decay_of", DECAY_OF), ("rate_of", RATE_OF)):
            object.__setattr__(self, name, default | _factors(name, getattr(self, name)))

    @property
    def dotted(self) -> bool:
        """True if `name` names a transformation of optax."""
        return "." in self.name

    def _check_name(self) -> None:
        """Raise UserError for options, momentum or Adam's keys that the rule does not use.

        Adam's keys are checked with a dotted name only.
        """
        default = type(self).momentum
        if self.momentum != default and self.name != "muon":
            raise UserError(
                f"config.optimizer.momentum is {self.momentum}: {self.name} does not use it. Set "
                f"the default {default}, or use muon."
            )
        if self.dotted:
            optax_by_name.check_options(self.name, self.options)
            for field in dataclasses.fields(self):
                if field.name in ADAM_KNOBS and getattr(self, field.name) != field.default:
                    raise UserError(
                        f"config.optimizer.{field.name} is {getattr(self, field.name)!r}: "
                        f"{self.name} does not use it. Set the default {field.default!r}, and give "
                        f"arguments in optimizer.options."
                    )
        elif self.options:
            raise UserError(
                f"config.optimizer.options is {dict(self.options)!r}: {self.name} does not use it. "
                f"Set its own keys, such as optimizer.b1."
            )


def _factors(key: str, given: Mapping[str, Any]) -> dict[str, float]:
    """Convert the given factors to floats; raises UserError for a wrong group or factor."""
    for group, factor in given.items():
        if group not in GROUPS:
            raise UserError(
                f"config.optimizer.{key}.{group} is set, but there is no group "
                f"{group!r}{suggest(group, GROUPS)}. Use {', '.join(GROUPS)}."
            )
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor >= 0:
            raise UserError(f"config.optimizer.{key}.{group} is {factor!r}. Set a number >= 0.")
    return {group: float(factor) for group, factor in given.items()}


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam of optax; moments are stored in `moment_dtype` and computed in the weights' dtype."""
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


def _adamw(config: OptimizerConfig, rule: ParamRule) -> list[optax.GradientTransformation]:
    del rule
    return [_adam(config)]


def _muon(config: OptimizerConfig, rule: ParamRule) -> list[optax.GradientTransformation]:
    """Muon for hidden matrices, Adam for all other parameters."""
    if rule.sides is None or not is_hidden_matrix(rule):
        return [_adam(config)]
    dtype = None if config.moment_dtype == "param" else config.moment_dtype
    return [scale_by_muon(rule.sides, config.momentum, dtype)]


def _adafactor(config: OptimizerConfig, rule: ParamRule) -> list[optax.GradientTransformation]:
    """Factored second moments (Shazeer and Stern, arXiv 1804.04235), without relative steps."""
    del config, rule
    return [
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),  # the rate is relative to the RMS of the weight, as in T5
    ]


# Name -> the transformations that turn a gradient into a direction, without weight decay.
OPTIMIZERS = {"adamw": _adamw, "adafactor": _adafactor, "muon": _muon}
# These compute each element separately, so they need no mapping over matrices.
ELEMENTWISE = ("adamw",)


def _transformation(
    config: OptimizerConfig, rule: ParamRule, given: optax.GradientTransformation | None
) -> optax.GradientTransformation:
    """Make the transformation of one parameter of one layer, weight decay included."""
    if given is not None:
        direction = [given]
    elif config.dotted:
        direction = optax_by_name.directions(config.name, config.options)
    else:
        direction = OPTIMIZERS[config.name](config, rule)
    # A mask instead of a shorter chain, so that the optimizer state of all parameters has one form.
    factor = config.decay_of[rule.decay_group]
    decay = optax.add_decayed_weights(config.weight_decay * factor, mask=lambda _: factor > 0)
    return optax.chain(*direction, decay)


class Optimizer:
    """An update rule applied to one matrix of one layer at a time (`ParamRule.matrices`).

    The rule is mapped over stacked layers, experts, and the gate and up matrices of an expert.  A
    rule that uses a whole matrix (Adafactor) therefore treats scanned and unrolled layers alike,
    and each expert independently of the others.  The state of a parameter is stacked and sharded
    like the parameter.

    Clipping and the learning rate are not part of the rule.  The learning rate is a function of the
    step and of `fall`, an array computed from the length of the run, which a compiled step reads
    from the train state.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        steps: int,
        *,
        frozen: tuple[str, ...] = (),
        transformation: optax.GradientTransformation | None = None,
    ):
        """Keep what does not change during a run.

        Args:
          config: the hyperparameters.
          steps: length of the run, for the schedule.
          frozen: groups of parameters that never change (`ParamRule.group`).
          transformation: replaces the one that `config.name` names; None: use that one.  It turns a
            gradient into a direction, as optax's `scale_by_*` do: a parameter changes by
            -rate(step) * (direction + weight_decay * parameter).

        Raises:
          UserError: the run is too short for the warm-up and the decay of the learning rate.
        """
        self.schedule, self.fall = make_schedule(config, steps), fall_of(config, steps)
        self._config, self._frozen, self._given = config, frozen, transformation

    def init(self, params: Params, rules: Params) -> Params:
        """Make the optimizer state before the first step.

        Args:
          params: the parameters.
          rules: a tree like `params` with the `ParamRule` of each parameter (`ModelDef.rules`).

        Returns:
          The tree of `params` with the state of the update rule in place of each leaf.

        Raises:
          UserError: the transformation cannot be applied to one of the parameters.
        """
        if self._config.dotted or self._given is not None:
            self._check(params, rules)
        return jax.tree.map(lambda rule, param: self._of(rule).init(param), rules, params)

    def update(
        self,
        gradients: Params,
        state: Params,
        params: Params,
        rules: Params,
        step: jax.Array,
        fall: Any = None,
    ) -> tuple[Params, Params]:
        """Update parameters and state by one step.

        Args:
          gradients: a tree like the parameters, clipped.
          state: of `init`, or of the previous step.
          params: the parameters.
          rules: as given to `init`.
          step: int32 scalar, from 0; decides the learning rate.
          fall: the decay's end and duration (`schedule.fall_of`); None: those of a run of `steps`.

        Returns:
          New parameters and new state; those of frozen groups are unchanged.

        Raises:
          UserError: as `init` does.
        """
        rate = self.schedule(step, self.fall if fall is None else fall)

        def one(rule, param, gradient, state):
            if rule.group in self._frozen:
                return param, state
            direction: Any
            direction, state = self._of(rule).update(gradient, state, param)
            own = rate * self._config.rate_of[rule.group]
            return param - (own * direction).astype(param.dtype), state

        pairs = jax.tree.map(one, rules, params, gradients, state)
        outer = jax.tree.structure(params)
        flat = outer.flatten_up_to(pairs)
        return outer.unflatten([p for p, _ in flat]), outer.unflatten([s for _, s in flat])

    def _check(self, params: Params, rules: Params) -> None:
        """Raise UserError as `init` does; checks each combination of shape and dtype once."""
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
        """Make the transformation of a parameter with this rule, all stacked layers at once."""
        one_layer = _transformation(self._config, rule, self._given)
        if self._given is not None or self._config.name not in ELEMENTWISE:
            for outer, axis in reversed(list(enumerate(rule.matrices))):
                one_layer = each(one_layer, axis - outer - rule.stacked)
        if not rule.stacked:
            return one_layer
        return optax.GradientTransformation(jax.vmap(one_layer.init), jax.vmap(one_layer.update))
