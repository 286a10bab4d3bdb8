"""Collectives of the dispatch region, and the varying-axes casts that shard_map requires.

E experts, M buffer rows per expert, P devices of the mesh axis.
"""

from typing import TypeVar

import jax

T = TypeVar("T")


def varying(tree: T, axes: tuple[str, ...]) -> T:
    """Mark every leaf as varying over the manual mesh axes `axes`; no data moves.

    The transpose is a psum over the added axes: exactly the gradient reduction that a weight or
    token replicated over them needs.
    """

    def cast(x):
        missing = tuple(axis for axis in axes if axis not in jax.typeof(x).manual_axis_type.varying)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def varying_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """Mark `x` as varying over the axes that `other` varies over; loop carries need this."""
    return varying(x, tuple(sorted(jax.typeof(other).manual_axis_type.varying)))


def to_experts(x_EM: jax.Array, axis: str, size: int) -> jax.Array:
    """Send each device its experts' rows: all-to-all [E, M, ...] -> [E/size, size*M, ...]."""
    if size == 1:
        return x_EM
    E, M, *rest = x_EM.shape
    x_PEM = _exchange(x_EM.reshape(size, E // size, M, *rest), axis)
    return x_PEM.swapaxes(0, 1).reshape(E // size, size * M, *rest)


def from_experts(x_EM: jax.Array, axis: str, size: int) -> jax.Array:
    """The inverse of `to_experts`."""
    if size == 1:
        return x_EM
    E, M, *rest = x_EM.shape
    x_EPM = x_EM.reshape(E, size, M // size, *rest)
    return _exchange(x_EPM.swapaxes(0, 1), axis).reshape(size * E, M // size, *rest)


def _exchange(x_P: jax.Array, axis: str) -> jax.Array:
    """All-to-all over the leading axis: device q's part p becomes device p's part q.

    Splitting and concatenating only the leading axis keeps the layout.  With one expert per device,
    TPUs lay out the result of `split_axis=1, concat_axis=0` with half of it padding.
    """
    return jax.lax.all_to_all(x_P, axis, split_axis=0, concat_axis=0, tiled=True)


def partitioned() -> bool:
    """True if XLA may partition the traced code: several devices, and not inside shard_map.

    XLA cannot partition a custom kernel, so none may be used then.
    """
    return jax.device_count() > 1 and not jax.sharding.get_abstract_mesh().manual_axes
