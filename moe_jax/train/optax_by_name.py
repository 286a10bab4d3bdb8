"""Finds, calls and checks the optax transformation that `optimizer.name` names.

Training applies a transformation to one matrix of one layer at a time, multiplies the direction
that it returns by the learning rate of the step, and shards its state like the parameter.
Transformations that cannot work this way are refused: norms of all gradients and other functions of
the whole tree, line searches, learning rates kept in the state.  The checks trace a transformation
and run no computation.
"""

import difflib
import functools
import inspect
import json
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Literal

from moe_jax.errors import UserError
from moe_jax.registry import suggest

# Arguments that other config keys decide, with the value that gives them no effect.
OWN_ARGUMENTS = {"learning_rate": 1.0, "weight_decay": 0.0}
# Annotations of arguments that a config cannot express.
_NOT_IN_A_CONFIG = ("GradientTransformation", "Callable")
# These return or use updates, whose sign is opposite to that of a direction: they would increase
# the loss.
STEPS = (optax.contrib.scale_by_cocob, optax.keep_params_nonnegative)


def find(name: str) -> Callable[..., Any]:
    """Find the optax function with a dotted name, such as `optax.contrib.scale_by_ademamix`.

    Only public functions and modules that optax itself defines are found.

    Raises:
      UserError: the function does not exist, or it does not make a gradient transformation.
    """
    head, _, rest = name.partition(".")
    if head != "optax":
        raise UserError(
            f"config.optimizer.name is {name!r}: a dotted name begins with optax. Set one such as "
            f"optax.scale_by_lion."
        )
    found: Any = optax
    for part in rest.split("."):
        known = _members(found)
        if part not in known:
            near = difflib.get_close_matches(part, known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise UserError(f"config.optimizer.name is {name!r}: optax has no {part!r}{hint}.")
        found = known[part]
    if isinstance(found, types.ModuleType):
        raise UserError(
            f"config.optimizer.name is {name!r}: this is a module of optax. Add the name of a "
            f"function."
        )
    if not _makes_transformation(found):
        raise UserError(
            f"config.optimizer.name is {name!r}, which makes no gradient transformation. Set a "
            f"function that makes one, such as optax.scale_by_lion."
        )
    if found in STEPS:
        raise UserError(
            f"config.optimizer.name is {name!r}, which expects updates that include the learning "
            f"rate. Set a transformation of gradients, such as optax.scale_by_lion."
        )
    return found


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Check keyword arguments for the optax function `name`.

    Raises:
      UserError: the function does not take an argument, or lacks one that it needs.
    """
    found = find(name)
    try:
        plain = json.loads(json.dumps(options)) == options
    except (TypeError, ValueError):
        plain = False
    if not plain:
        raise UserError(
            f"config.optimizer.options is {dict(options)!r}: give numbers, strings, True, False, "
            f"None, and lists and mappings of these."
        )
    for key in options:
        if any(own in key for own in OWN_ARGUMENTS) or key == "mask":
            raise UserError(
                f"config.optimizer.options.{key} is set: other keys decide it. Remove it and set "
                f"optimizer.learning_rate, optimizer.schedule and optimizer.weight_decay."
            )
    takes = {key: p for key, p in _parameters(found).items() if key not in OWN_ARGUMENTS}
    keywords = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    for key in options:
        if key not in takes and not keywords:
            raise UserError(
                f"config.optimizer.options.{key} is not an argument of {name}{suggest(key, takes)}."
            )
    for key, parameter in takes.items():
        optional = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not optional and key not in options:
            if any(kind in str(parameter.annotation) for kind in _NOT_IN_A_CONFIG):
                raise UserError(
                    f"config.optimizer.name is {name!r}: its argument {key} is a function or a "
                    f"transformation, which a config cannot hold. Set one without such arguments, "
                    f"such as optax.scale_by_lion."
                )
            raise UserError(
                f"config.optimizer.name is {name!r}: it needs the argument {key}. Set "
                f"optimizer.options.{key}."
            )


def directions(name: str, options: Mapping[str, Any]) -> list[optax.GradientTransformation]:
    """Make the transformations from gradient to direction, which is multiplied by -learning rate.

    A function that takes `learning_rate` is called with 1 and its updates are negated.  A function
    that takes `weight_decay` is called with 0, because training adds weight decay itself.

    Args:
      name: a dotted name.
      options: keyword arguments that `check_options` accepts.

    Returns:
      Transformations to chain.

    Raises:
      UserError: the call fails, or does not return a gradient transformation.
    """
    try:
        made = _call(name, options)
    except Exception as error:  # optax raises any type for arguments that do not fit
        raise UserError(
            f"config.optimizer.name is {name!r}: the call with optimizer.options "
            f"{dict(options)!r} failed ({_line(error)})."
        ) from error
    if not isinstance(made, optax.GradientTransformation):
        raise UserError(
            f"config.optimizer.name is {name!r}, which makes a {type(made).__name__}. Set a "
            f"function that makes a gradient transformation, such as optax.scale_by_lion."
        )
    return [made, optax.scale(-1.0)] if _takes_rate(name) else [made]


def check_parameter(
    name: str, options: Mapping[str, Any], path: str, parameter: jax.ShapeDtypeStruct
) -> None:
    """Check that training can apply a transformation to one matrix of one layer.

    Args:
      name: a dotted name.
      options: keyword arguments that `check_options` accepts.
      path: the parameter's name, for the message.
      parameter: its shape and dtype within one layer.

    Raises:
      UserError: its state has a shape that is neither the parameter's nor a scalar's, its updates
        need more than a gradient or depend on other parameters, or it keeps the learning rate.
    """
    rule = optax.chain(*directions(name, options))
    try:
        problem = _state_problem(rule, parameter) or _use_problem(rule, name, options, parameter)
    except Exception as error:  # optax raises any type for arguments that do not fit
        problem = f"it fails ({_line(error)})"
    if problem:
        raise UserError(
            f"config.optimizer.name is {name!r}: for {path} {list(parameter.shape)} {problem}. Set "
            f"a different transformation, or adamw, adafactor or muon."
        )


def check_state(
    rule: optax.GradientTransformation, path: str, parameter: jax.ShapeDtypeStruct
) -> None:
    """Check that the state of a transformation fits one matrix of one layer.

    Args:
      rule: the transformation.
      path: the parameter's name, for the message.
      parameter: its shape and dtype within one layer.

    Raises:
      UserError: as `check_parameter`, for the state.
    """
    try:
        problem = _state_problem(rule, parameter)
    except Exception as error:  # the caller's code raises any type for arguments that do not fit
        problem = f"it fails ({_line(error)})"
    if problem:
        raise UserError(
            f"The transformation given to Optimizer does not fit: for {path} "
            f"{list(parameter.shape)} {problem}."
        )


def dependencies(function: Callable[..., Any], *arguments: Any) -> list[set[int]]:
    """Trace which arguments the results of a function may depend on.

    All results of an equation count as depending on all its inputs, so the answer may name too many
    arguments.

    Args:
      function: of trees of arrays.
      arguments: arrays, or their shapes and dtypes.

    Returns:
      For each output leaf, the numbers of its arguments.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    numbers = [i for i, tree in enumerate(arguments) for _ in jax.tree.leaves(tree)]
    known = {var: {number} for var, number in zip(jaxpr.invars, numbers, strict=True)}

    def depends_on(variables: Sequence[Any]) -> set[int]:
        found = (known.get(v, set()) for v in variables if not isinstance(v, Literal))
        return set[int]().union(*found)

    for equation in jaxpr.eqns:
        known |= dict.fromkeys(equation.outvars, depends_on(equation.invars))
    return [depends_on([variable]) for variable in jaxpr.outvars]


def _state_problem(rule: optax.GradientTransformation, parameter: jax.ShapeDtypeStruct) -> str:
    """The reason why the state cannot be stored with the parameter; empty if it can."""
    state = jax.eval_shape(rule.init, parameter)
    for leaf in jax.tree.leaves(state):
        if leaf.shape not in ((), parameter.shape):
            return (
                f"it keeps state of shape {list(leaf.shape)}, which is neither a scalar nor of the "
                f"parameter's shape and cannot be sharded"
            )
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return f"it keeps state of type {leaf.dtype}, which a checkpoint cannot hold"
    _, after = jax.eval_shape(rule.update, parameter, state, parameter)
    form = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (state, after))
    return "" if form[0] == form[1] else "an update changes the shape or type of its state"


def _use_problem(
    rule: optax.GradientTransformation,
    name: str,
    options: Mapping[str, Any],
    parameter: jax.ShapeDtypeStruct,
) -> str:
    """The reason why it cannot run per parameter or with a scheduled rate; empty if it can."""
    two = (parameter, parameter)
    state = jax.eval_shape(rule.init, two)

    def update(first, second, state):
        gradients, parameters = zip(first, second, strict=True)
        return rule.update(gradients, state, parameters)

    if any({0, 1} <= on for on in dependencies(update, two, two, state)):
        return "its update may depend on other parameters, but parameters are updated one by one"

    def state_at(rate, gradient):
        rule = _call(name, options, rate)
        return rule.update(gradient, rule.init(gradient), gradient)[1]

    rate = jax.ShapeDtypeStruct((), jnp.float32)
    if _takes_rate(name) and any(0 in on for on in dependencies(state_at, rate, parameter)):
        return "it keeps the learning rate in its state, where the schedule cannot change it"
    return ""


def _call(name: str, options: Mapping[str, Any], rate: Any = OWN_ARGUMENTS["learning_rate"]) -> Any:
    """Call `name`; if it takes a learning rate or weight decay, with `rate` and without decay."""
    found = find(name)
    own = OWN_ARGUMENTS | {"learning_rate": rate}
    return found(**options, **{key: own[key] for key in own if key in _parameters(found)})


def _takes_rate(name: str) -> bool:
    return "learning_rate" in _parameters(find(name))


def _members(module: Any) -> dict[str, Any]:
    """The public functions and modules in a module of optax; empty for a function."""
    if not isinstance(module, types.ModuleType):
        return {}
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and _of_optax(value)
    }


def _makes_transformation(found: Callable[..., Any]) -> bool:
    """False if its annotation names a different return type.

    Functions of optax without a return annotation make transformations only if they can be called
    without arguments; the result of the call is checked later.
    """
    signature = inspect.signature(found)
    if signature.return_annotation is signature.empty:
        needed = (p for p in signature.parameters.values() if p.default is p.empty)
        return all(p.name in OWN_ARGUMENTS or p.kind is p.VAR_KEYWORD for p in needed)
    # Only the head counts: a Callable[..., GradientTransformation] would need a second call.
    return "GradientTransformation" in str(signature.return_annotation).partition("[")[0]


def _of_optax(value: Any) -> bool:
    """True for a module or function that optax defines, rather than one that it imports."""
    if isinstance(value, functools.partial):
        return _of_optax(value.func)
    if isinstance(value, types.ModuleType):
        return value.__name__.partition(".")[0] == "optax"
    return isinstance(value, types.FunctionType) and value.__module__.partition(".")[0] == "optax"


def _parameters(found: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(found).parameters


def _line(error: Exception) -> str:
    """The type and the first line of an exception."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0].rstrip('.')}"
