"""Collectives of the dispatch region, and the bookkeeping shard_map asks for around them."""

from typing import TypeVar

import jax

T = TypeVar("T")


def varying(tree: T, axes: tuple[str, ...]) -> T:
    """Mark every leaf as differing over the manual mesh axes `axes`; no data moves.

    The transpose is a psum over the axes that were added: exactly the gradient reduction a weight
    or token needs that was replicated over them.
    """

    def cast(x):
        missing = tuple(axis for axis in axes if axis not in jax.typeof(x).manual_axis_type.varying)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def varying_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """`x` marked as differing over the axes that `other` differs over (loop carries need it)."""
    return varying(x, tuple(sorted(jax.typeof(other).manual_axis_type.varying)))


def to_experts(x_EM: jax.Array, axis: str, size: int) -> jax.Array:
    """All-to-all [E, M, ...] -> [E/size, size*M, ...]: each device gets its experts' rows."""
    if size == 1:
        return x_EM
    E, M, *rest = x_EM.shape
    x_PEM = _exchange(x_EM.reshape(size, E // size, M, *rest), axis)
    return x_PEM.swapaxes(0, 1).reshape(E // size, size * M, *rest)


def from_experts(x_EM: jax.Array, axis: str, size: int) -> jax.Array:
    """Inverse of `to_experts`."""
    if size == 1:
        return x_EM
    E, M, *rest = x_EM.shape
    x_EPM = x_EM.reshape(E, size, M // size, *rest)
    return _exchange(x_EPM.swapaxes(0, 1), axis).reshape(size * E, M // size, *rest)


def _exchange(x_P: jax.Array, axis: str) -> jax.Array:
    """Part p of the leading axis goes to device p, and comes from there.

    Splitting and joining the leading axis alone leaves the layout as it is.  With one expert a
    device, TPUs lay the result of `split_axis=1, concat_axis=0` out with half of it padding.
    """
    return jax.lax.all_to_all(x_P, axis, split_axis=0, concat_axis=0, tiled=True)


def partitioned() -> bool:
    """Whether XLA may split what is traced here over devices: several, and no shard_map around.

    It cannot split a kernel of our own, which then has to be left out.
    """
    return jax.device_count() > 1 and not jax.sharding.get_abstract_mesh().manual_axes
