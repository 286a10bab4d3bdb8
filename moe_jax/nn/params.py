"""Declares parameters: name, shape, logical axes, optimizer group and initializer together.

Axes in examples: E experts, D width, F hidden width, H heads, A head width, U matrices of an
expert's first layer.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

T = TypeVar("T")
Initializer = Callable[[jax.Array, Sequence[int], Any], jax.Array]

_TRUNCATED_STD = 0.87962566103423978  # std of a standard normal cut at two sigma

# Parameter groups of the optimizer.  Shared experts are "ffn": every token passes through them.
GROUPS = ("attention", "embedding", "experts", "ffn", "head", "norm", "router")

# Logical axes that index separate matrices: the experts (E), and the gate and up projections of
# one expert (U).
MATRIX_AXES = ("experts", "expert_matrices")
# Logical axes that together form one side of a matrix: the heads and their width.
HEAD_AXES = ("heads", "kv_heads", "head_dim")


@dataclasses.dataclass(frozen=True)
class ParamRule:
    """The properties of a parameter from which the optimizer's rules follow."""

    group: str  # one of GROUPS
    axes: tuple[str | None, ...]  # logical axes; the first is "layers" if layers are stacked

    @property
    def stacked(self) -> bool:
        """True if the first axis indexes layers, each of which counts as one parameter."""
        return self.axes[:1] == ("layers",)

    @property
    def decay_group(self) -> str:
        """The group whose weight-decay factor applies: "norm" for vectors, such as a bias."""
        return self.group if len(self.axes) - self.stacked >= 2 else "norm"

    @property
    def matrices(self) -> tuple[int, ...]:
        """The axes of the parameter, stacked or not, that index separate matrices.

        For an optimizer, a matrix is a parameter of one layer, of any rank, at one index of each of
        these axes: w_in_EDUF holds E * U matrices [D, F], and w_out_EFD holds E matrices [F, D].
        All other parameters are one matrix each, such as the projections of all heads, q_DHA.
        """
        return tuple(i for i, axis in enumerate(self.axes) if axis in MATRIX_AXES)

    @property
    def sides(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """The input axes and the output axes of one matrix, as indices into `matrix_shape`.

        For q_DHA they are (0,) and (1, 2).  None: it has not two sides, such as a vector.
        """
        axes = self.matrix_shape(self.axes)
        sides: list[tuple[int, ...]] = []
        for i, axis in enumerate(axes):
            if i and {axis, axes[i - 1]} <= set(HEAD_AXES):
                sides[-1] += (i,)
            else:
                sides.append((i,))
        return (sides[0], sides[1]) if len(sides) == 2 else None

    def matrix_shape(self, shape: Sequence[T]) -> tuple[T, ...]:
        """The part of `shape`, the parameter's shape or axes, that belongs to one matrix."""
        return tuple(
            size for i, size in enumerate(shape) if i >= self.stacked and i not in self.matrices
        )

    def stack(self) -> "ParamRule":
        """The rule of the same parameter of several layers, stacked."""
        return dataclasses.replace(self, axes=("layers", *self.axes))


def param_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype of parameters: float32, or float64 if the computation is float64 (the oracle)."""
    return jnp.promote_types(dtype, jnp.float32)


def param(
    rngs: nnx.Rngs,
    name: str,
    shape: Sequence[int],
    logical_axes: Sequence[str | None],
    init: Initializer,
    dtype: DTypeLike,
    *,
    group: str,
    compute_dtype_only: bool = False,
) -> nnx.Param:
    """Create a parameter with the metadata `logical_axes`, `group` and `compute_dtype_only`.

    Its key is the `params` key of `rngs` folded with `name`, not with a counter, so its value does
    not depend on which other parameters exist or on their order.

    Args:
      rngs: its `params` key is the module's.
      name: unique within the module.
      shape: of the value.
      logical_axes: one name (or None) for each dimension.
      init: draws the value.
      dtype: of the value.
      group: one of GROUPS; the optimizer's rules follow from it and from the axes (`ParamRule`).
      compute_dtype_only: True if layers read it only in the compute dtype, so that a compute-dtype
        copy can replace it in the forward and backward pass.

    Raises:
      ValueError: an unknown group, or axes that do not fit the shape.
    """
    if len(shape) != len(logical_axes):
        raise ValueError(
            f"parameter {name}: shape {shape} and logical axes {logical_axes} differ in length"
        )
    if group not in GROUPS:
        raise ValueError(f"parameter {name}: group {group!r} is not one of {', '.join(GROUPS)}")
    key = jax.random.fold_in(rngs.params.key.get_value(), zlib.crc32(name.encode()))
    value = init(key, tuple(shape), dtype)
    return nnx.Param(
        value, logical_axes=tuple(logical_axes), group=group, compute_dtype_only=compute_dtype_only
    )


def truncated_normal(std: float) -> Initializer:
    """The initializer of a normal cut at two sigma, with standard deviation `std` after the cut."""

    def init(key, shape, dtype):
        sample = jax.random.truncated_normal(key, -2.0, 2.0, tuple(shape), dtype)
        return sample * jnp.asarray(std / _TRUNCATED_STD, dtype)

    return init


def fan_in(size: int, scale: float = 1.0) -> Initializer:
    """The truncated normal of std scale / sqrt(size), for `size` inputs summed into one output."""
    return truncated_normal(scale / math.sqrt(size))


def residual_fan_in(size: int, num_layers: int, scale: float = 1.0) -> Initializer:
    """The `fan_in` initializer, scaled by 1 / sqrt(2 L), of a projection to the residual stream.

    Each of L layers adds to the stream twice; with the factor its variance stays bounded in depth
    (GPT-2).
    """
    return truncated_normal(scale / math.sqrt(size * 2 * num_layers))


def ones(key: jax.Array, shape: Sequence[int], dtype: DTypeLike) -> jax.Array:
    """An initializer of all ones, for the weights of norms."""
    del key
    return jnp.ones(tuple(shape), dtype)


def fresh(rngs: nnx.Rngs) -> nnx.Rngs:
    """The keys of `rngs` for the first module made from it, and different keys for each later one.

    Layers that a caller makes from one `rngs` therefore differ, as NNX's own layers do.
    """
    stream = rngs.params
    key, count = stream.key.get_value(), stream.count.get_value()
    stream()  # increments the count
    return nnx.Rngs(params=jnp.where(count == 0, key, jax.random.fold_in(key, count)))


def scoped(rngs: nnx.Rngs, name: str | int | jax.Array) -> nnx.Rngs:
    """The keys of a submodule: those of `rngs` folded with its name, independent of past draws."""
    number = zlib.crc32(name.encode()) if isinstance(name, str) else name
    return nnx.Rngs(params=jax.random.fold_in(rngs.params.key.get_value(), number))
