"""Applies an optax transformation separately to each matrix of an array.

A rule that uses a whole matrix, such as Adafactor or LAMB, would treat a stack of experts as one
matrix.  The norms, factored moments and clipping of an expert would then depend on other experts.
"""

from typing import Any

import jax
import optax

from moe_jax.train.optax_by_name import dependencies


def each(rule: optax.GradientTransformation, axis: int) -> optax.GradientTransformation:
    """Make the transformation that applies `rule` at every index of one axis.

    Args:
      rule: for an array without that axis.
      axis: of the parameter.

    Returns:
      A transformation with the state of `rule`.  State with the parameter's shape keeps that shape,
      so that it is sharded like the parameter.  Other arrays, and scalars that depend on gradients,
      get the axis as their first.  Other scalars, such as counters, are equal for all matrices and
      stored once.
    """

    def one(array: jax.Array) -> jax.ShapeDtypeStruct:
        shape = (*array.shape[:axis], *array.shape[axis + 1 :])
        return jax.ShapeDtypeStruct(shape, array.dtype)

    def init(params: Any) -> Any:
        form, where = _state_axes(rule, one(params), axis)

        def leaves(matrix: Any) -> Any:
            return jax.tree.leaves(rule.init(matrix))

        made = jax.vmap(leaves, in_axes=axis, out_axes=where)(params)
        return jax.tree.unflatten(form, made)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        form, where = _state_axes(rule, one(params), axis)

        def leaves(gradient: Any, state: Any, matrix: Any) -> Any:
            direction, state = rule.update(gradient, jax.tree.unflatten(form, state), matrix)
            return direction, jax.tree.leaves(state)

        mapped = jax.vmap(leaves, in_axes=(axis, where, axis), out_axes=(axis, where))
        direction, made = mapped(updates, jax.tree.leaves(state), params)
        return direction, jax.tree.unflatten(form, made)

    return optax.GradientTransformation(init, update)


def _state_axes(
    rule: optax.GradientTransformation, matrix: jax.ShapeDtypeStruct, axis: int
) -> tuple[Any, list[int | None]]:
    """The state structure of `rule` and the axis in each leaf; None: the leaf has no such axis."""
    state = jax.eval_shape(rule.init, matrix)
    leaves, form = jax.tree.flatten(state)
    numbers = [i for i, leaf in enumerate(leaves) if leaf.shape == ()]
    arrays = [i for i in range(len(leaves)) if i not in numbers]

    def next_numbers(scalars, gradient, matrix, rest):
        state = dict(zip([*numbers, *arrays], [*scalars, *rest], strict=True))
        state = jax.tree.unflatten(form, [state[i] for i in range(len(leaves))])
        made = jax.tree.leaves(rule.update(gradient, state, matrix)[1])
        return [made[i] for i in numbers]

    scalars, rest = [leaves[i] for i in numbers], [leaves[i] for i in arrays]
    reached = dependencies(next_numbers, scalars, matrix, matrix, rest)
    shared = all(on <= {0} for on in reached)

    def place(leaf: jax.ShapeDtypeStruct) -> int | None:
        if leaf.shape == ():
            return None if shared else 0
        return axis if leaf.shape == matrix.shape else 0

    return form, [place(leaf) for leaf in leaves]
