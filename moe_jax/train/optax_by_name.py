"""Optax transformations that a config names: looked up, called, and held to what training does.

Training applies a transformation to one matrix of one layer at a time, multiplies the direction
it returns by the learning rate of the step, and keeps its state beside the parameter, sharded like
it.  What cannot work so is refused: norms of all gradients and other functions of the whole tree,
line searches, learning rates kept in the state.  Transformations are traced to find out; nothing
here computes.
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

# Arguments that the project decides, with the value that leaves them out.
OWN_ARGUMENTS = {"learning_rate": 1.0, "weight_decay": 0.0}
# Annotations of arguments that only code makes.
_NOT_IN_A_CONFIG = ("GradientTransformation", "Callable")
# These make or read steps, which have the sign of optax's updates: as directions they lead uphill.
STEPS = (optax.contrib.scale_by_cocob, optax.keep_params_nonnegative)


def find(name: str) -> Callable[..., Any]:
    """The function of optax with a dotted name, such as `optax.contrib.scale_by_ademamix`.

    Only public functions and modules that optax itself defines are found.

    Raises:
      UserError: there is no such function, or it makes no gradient transformation.
    """
    head, _, rest = name.partition(".")
    if head != "optax":
        raise UserError(
            f"optimizer.name is {name!r}: a dotted name begins with optax, such as "
            f"optax.scale_by_lion."
        )
    found: Any = optax
    for part in rest.split("."):
        known = _members(found)
        if part not in known:
            near = difflib.get_close_matches(part, known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise UserError(f"optimizer.name is {name!r}: optax has no {part!r} there{hint}.")
        found = known[part]
    if isinstance(found, types.ModuleType):
        raise UserError(f"optimizer.name is {name!r}, a module of optax: add a function's name.")
    if not _makes_transformation(found):
        raise UserError(
            f"optimizer.name is {name!r}, which makes no gradient transformation: name a function "
            f"that makes one, such as optax.scale_by_lion."
        )
    if found in STEPS:
        raise UserError(
            f"optimizer.name is {name!r}, which works on steps that include the learning rate: "
            f"use a transformation that makes a direction, such as optax.scale_by_lion."
        )
    return found


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises UserError for keyword arguments that the function `name` does not take or lacks."""
    found = find(name)
    try:
        plain = json.loads(json.dumps(options)) == options
    except (TypeError, ValueError):
        plain = False
    if not plain:
        raise UserError(
            f"optimizer.options is {dict(options)!r}: give numbers, strings, True, False, None, "
            f"lists and mappings of these."
        )
    for key in options:
        if any(own in key for own in OWN_ARGUMENTS) or key == "mask":
            raise UserError(
                f"optimizer.options.{key} is given: set optimizer.learning_rate, "
                f"optimizer.schedule and optimizer.weight_decay instead, and remove it."
            )
    takes = {key: p for key, p in _parameters(found).items() if key not in OWN_ARGUMENTS}
    keywords = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    for key in options:
        if key not in takes and not keywords:
            raise UserError(
                f"optimizer.options.{key} is not an argument of {name}{suggest(key, takes)}."
            )
    for key, parameter in takes.items():
        optional = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not optional and key not in options:
            if any(kind in str(parameter.annotation) for kind in _NOT_IN_A_CONFIG):
                raise UserError(
                    f"optimizer.name is {name!r}, whose argument {key} is a function or a "
                    f"transformation, which a config cannot hold: name one that needs none, such "
                    f"as optax.scale_by_lion."
                )
            raise UserError(f"optimizer.name is {name!r}: set optimizer.options.{key}.")


def directions(name: str, options: Mapping[str, Any]) -> list[optax.GradientTransformation]:
    """What `name` called with `options` makes of a gradient, to be multiplied by -learning rate.

    A function that takes `learning_rate` is called with 1, and its updates, which are steps down,
    are negated.  One that takes `weight_decay` is called with 0: decay is added for all alike.

    Args:
      name: a dotted name.
      options: keyword arguments, as `check_options` accepts them.

    Returns:
      Transformations to chain.

    Raises:
      UserError: the call fails, or its result cannot be used with a scheduled learning rate.
    """
    try:
        made = _call(name, options)
    except Exception as error:  # of optax's own checks: the arguments are the user's
        raise UserError(
            f"optimizer.name is {name!r}: calling it with optimizer.options {dict(options)!r} "
            f"failed ({_line(error)})."
        ) from error
    if not isinstance(made, optax.GradientTransformation):
        raise UserError(
            f"optimizer.name is {name!r}, which makes a {type(made).__name__}: name a function "
            f"that makes a gradient transformation, such as optax.scale_by_lion."
        )
    return [made, optax.scale(-1.0)] if _takes_rate(name) else [made]


def check_parameter(
    name: str, options: Mapping[str, Any], path: str, parameter: jax.ShapeDtypeStruct
) -> None:
    """Hold a transformation to what training does to one matrix of one layer.

    Args:
      name: a dotted name.
      options: keyword arguments, as `check_options` accepts them.
      path: the parameter's name, for the sentence.
      parameter: its shape and dtype within one layer.

    Raises:
      UserError: its state has another shape than the parameter's or a scalar's, its updates need
        more than a gradient, or depend on other parameters, or it keeps the learning rate.
    """
    rule = optax.chain(*directions(name, options))
    try:
        problem = _state_problem(rule, parameter) or _use_problem(rule, name, options, parameter)
    except Exception as error:  # what optax's code raises for arguments that do not fit
        problem = f"it fails ({_line(error)})"
    if problem:
        raise UserError(
            f"optimizer.name is {name!r}: for {path} {list(parameter.shape)} {problem}; use "
            f"another transformation, or adamw, adafactor or muon."
        )


def check_state(
    rule: optax.GradientTransformation, path: str, parameter: jax.ShapeDtypeStruct
) -> None:
    """Hold the state of a transformation to one matrix of one layer; see `check_parameter`."""
    try:
        problem = _state_problem(rule, parameter)
    except Exception as error:  # what its code raises for arguments that do not fit
        problem = f"it fails ({_line(error)})"
    if problem:
        raise UserError(
            f"The optimizer's transformation: for {path} {list(parameter.shape)} {problem}."
        )


def dependencies(function: Callable[..., Any], *arguments: Any) -> list[set[int]]:
    """Trace which arguments a function's results may depend on.

    Each equation of the traced function counts as a whole: the answer may name too many arguments.

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
    """Why its state cannot lie beside the parameter; empty if it can."""
    state = jax.eval_shape(rule.init, parameter)
    for leaf in jax.tree.leaves(state):
        if leaf.shape not in ((), parameter.shape):
            return (
                f"it keeps state of shape {list(leaf.shape)}, which is neither the parameter's nor "
                f"a scalar's and cannot be sharded"
            )
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return f"it keeps state of type {leaf.dtype}, which no checkpoint holds"
    _, after = jax.eval_shape(rule.update, parameter, state, parameter)
    form = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (state, after))
    return "" if form[0] == form[1] else "an update changes the shape or type of its state"


def _use_problem(
    rule: optax.GradientTransformation,
    name: str,
    options: Mapping[str, Any],
    parameter: jax.ShapeDtypeStruct,
) -> str:
    """Why it cannot be applied parameter by parameter or at a scheduled rate; empty if it can."""
    two = (parameter, parameter)
    state = jax.eval_shape(rule.init, two)

    def update(first, second, state):
        gradients, parameters = zip(first, second, strict=True)
        return rule.update(gradients, state, parameters)

    if any({0, 1} <= on for on in dependencies(update, two, two, state)):
        return "its update may depend on other parameters, which are updated one by one"

    def state_at(rate, gradient):
        rule = _call(name, options, rate)
        return rule.update(gradient, rule.init(gradient), gradient)[1]

    rate = jax.ShapeDtypeStruct((), jnp.float32)
    if _takes_rate(name) and any(0 in on for on in dependencies(state_at, rate, parameter)):
        return "it keeps the learning rate in its state, which a schedule would not reach"
    return ""


def _call(name: str, options: Mapping[str, Any], rate: Any = OWN_ARGUMENTS["learning_rate"]) -> Any:
    """What `name` returns, called at `rate` and without weight decay where it takes them."""
    found = find(name)
    own = OWN_ARGUMENTS | {"learning_rate": rate}
    return found(**options, **{key: own[key] for key in own if key in _parameters(found)})


def _takes_rate(name: str) -> bool:
    return "learning_rate" in _parameters(find(name))


def _members(module: Any) -> dict[str, Any]:
    """Public functions and modules of optax in one of its modules; a function has none."""
    if not isinstance(module, types.ModuleType):
        return {}
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and _of_optax(value)
    }


def _makes_transformation(found: Callable[..., Any]) -> bool:
    """False if its annotation says what else it returns.

    Functions of optax without one make transformations only if they can be called without
    arguments; the call then tells.
    """
    signature = inspect.signature(found)
    if signature.return_annotation is signature.empty:
        needed = (p for p in signature.parameters.values() if p.default is p.empty)
        return all(p.name in OWN_ARGUMENTS or p.kind is p.VAR_KEYWORD for p in needed)
    # Of Callable[..., GradientTransformation] only the head counts: it has to be called again.
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
    """Type and first line of an exception."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0].rstrip('.')}"
