"""How a module declares a parameter: name, shape, logical axes, group and initialiser together."""

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

# What a parameter belongs to.  Shared experts are "ffn": every token passes through them.
GROUPS = ("attention", "embedding", "experts", "ffn", "head", "norm", "router")

# Logical axes each index of which holds a matrix of its own: E experts, and U, the gate and up
# projections of an expert.
MATRIX_AXES = ("experts", "expert_matrices")
# Logical axes that are one side of a matrix together: all heads' widths.
HEAD_AXES = ("heads", "kv_heads", "head_dim")


@dataclasses.dataclass(frozen=True)
class ParamRule:
    """What decides how the optimizer treats a parameter."""

    group: str  # one of GROUPS
    axes: tuple[str | None, ...]  # logical; the first is "layers" where layers are stacked

    @property
    def stacked(self) -> bool:
        """True if the first axis counts layers, each of which is a parameter of its own."""
        return self.axes[:1] == ("layers",)

    @property
    def decay_group(self) -> str:
        """The group by whose factor it decays: a layer's vector, such as a bias, is as a norm."""
        return self.group if len(self.axes) - self.stacked >= 2 else "norm"

    @property
    def matrices(self) -> tuple[int, ...]:
        """Axes of the parameter, stacked or not, that tell its matrices apart.

        What an optimizer calls a matrix is a parameter of one layer, whatever its rank, at one
        index of each of these: w_in_EDUF holds E * U matrices [D, F] and w_out_EFD E of them,
        [F, D].  All others are one each, such as the projections of all heads, q_DHA.
        """
        return tuple(i for i, axis in enumerate(self.axes) if axis in MATRIX_AXES)

    @property
    def sides(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Axes of one matrix, as `matrix_shape` has them: those of its inputs, of its outputs.

        Those of q_DHA are (0,) and (1, 2).  None: it has not two sides, as no vector has.
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
        """The shape of one matrix of this parameter, whose own shape is `shape`; or its axes."""
        return tuple(
            size for i, size in enumerate(shape) if i >= self.stacked and i not in self.matrices
        )

    def stack(self) -> "ParamRule":
        """The rule of this parameter of several layers, stacked."""
        return dataclasses.replace(self, axes=("layers", *self.axes))


def param_dtype(dtype: DTypeLike) -> np.dtype:
    """Parameters are float32, and float64 where the computation is (the oracle)."""
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
    narrow: bool = False,
) -> nnx.Param:
    """A parameter with the metadata `logical_axes`, `group` and `narrow`.

    Its key is the `params` key of `rngs` folded with `name`, never a counter: the value does not
    depend on which other parameters exist or on their order.

    Args:
      rngs: its `params` key is the module's.
      name: unique within the module.
      shape: of the value.
      logical_axes: one name (or None) for each dimension.
      init: draws the value.
      dtype: of the value.
      group: one of GROUPS; the optimizer's rules follow from it and from the axes (`ParamRule`).
      narrow: True if layers read it in the computation's dtype alone, so that a copy in that dtype
        serves as well.

    Raises:
      ValueError: an unknown group, or axes that do not fit the shape.
    """
    if len(shape) != len(logical_axes):
        raise ValueError(f"parameter {name}: shape {shape} against logical axes {logical_axes}")
    if group not in GROUPS:
        raise ValueError(f"parameter {name}: group {group!r} is not one of {', '.join(GROUPS)}")
    key = jax.random.fold_in(rngs.params.key.get_value(), zlib.crc32(name.encode()))
    value = init(key, tuple(shape), dtype)
    return nnx.Param(value, logical_axes=tuple(logical_axes), group=group, narrow=narrow)


def truncated_normal(std: float) -> Initializer:
    """Normal cut at two sigma, with standard deviation `std` after the cut."""

    def init(key, shape, dtype):
        sample = jax.random.truncated_normal(key, -2.0, 2.0, tuple(shape), dtype)
        return sample * jnp.asarray(std / _TRUNCATED_STD, dtype)

    return init


def fan_in(size: int) -> Initializer:
    """Truncated normal of variance 1 / size, where `size` inputs are summed into one output."""
    return truncated_normal(1 / math.sqrt(size))


def residual_fan_in(size: int, num_layers: int) -> Initializer:
    """`fan_in` for a projection onto the residual stream, scaled by 1 / sqrt(2 L).

    A block adds to the stream twice, so its variance stays bounded in depth (GPT-2).
    """
    return truncated_normal(1 / math.sqrt(size * 2 * num_layers))


def ones(key: jax.Array, shape: Sequence[int], dtype: DTypeLike) -> jax.Array:
    """All ones, for the weights of norms."""
    del key
    return jnp.ones(tuple(shape), dtype)


def fresh(rngs: nnx.Rngs) -> nnx.Rngs:
    """`rngs` for the first module that is made from them, other keys for each one after it.

    So layers that a caller makes from one `rngs` differ, as NNX's own do.
    """
    stream = rngs.params
    key, count = stream.key.get_value(), stream.count.get_value()
    stream()  # it counts
    return nnx.Rngs(params=jnp.where(count == 0, key, jax.random.fold_in(key, count)))


def scoped(rngs: nnx.Rngs, name: str | int | jax.Array) -> nnx.Rngs:
    """Keys for a submodule: those of `rngs` folded with its name, whatever was drawn before."""
    number = zlib.crc32(name.encode()) if isinstance(name, str) else name
    return nnx.Rngs(params=jax.random.fold_in(rngs.params.key.get_value(), number))
