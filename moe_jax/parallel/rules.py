"""Maps logical axes to mesh axes; every sharding is derived from this table."""

from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.parallel.mesh import AXES, BATCH_AXES

MeshAxes = tuple[str, ...]

# Logical axis -> mesh axes.  Weights shard one large dimension over fsdp and one over tensor.
# Expert weights are also sharded over expert, and over fsdp as `on_mesh` says; their fsdp shards
# are all-gathered on entry to the dispatch region.
RULES: dict[str, MeshAxes] = {
    "batch": BATCH_AXES,
    "group": BATCH_AXES,
    "embed": ("fsdp",),
    "expert_embed": ("fsdp",),
    "experts": ("expert",),
    "whole_experts": ("expert", "fsdp"),
    "router_experts": (),
    "expert_matrices": (),
    "expert_mlp": ("tensor",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "vocab": ("tensor",),
    "norm": (),
    "layers": (),
}


def check_rules(rules: Mapping[str, MeshAxes]) -> None:
    """Raise ValueError if an entry names an unknown mesh axis, or one mesh axis twice."""
    for name, axes in rules.items():
        unknown = [axis for axis in axes if axis not in AXES]
        if unknown:
            raise ValueError(f"logical axis {name!r} maps to unknown mesh axes {unknown}")
        if len(set(axes)) != len(axes):
            raise ValueError(f"logical axis {name!r} repeats a mesh axis: {axes}")


check_rules(RULES)


def spec(logical_axes: Sequence[str | None], rules: Mapping[str, MeshAxes] = RULES) -> P:
    """The PartitionSpec of a tensor with these logical axes (None: not sharded).

    Raises ValueError for an unknown name, a repeated name, or two names that map to one mesh axis.
    """
    named = [name for name in logical_axes if name is not None]
    unknown = [name for name in named if name not in rules]
    if unknown:
        raise ValueError(f"unknown logical axes {unknown}; add them to RULES")
    if len(set(named)) != len(named):
        raise ValueError(f"logical axes {tuple(logical_axes)} repeat a name")
    used = [axis for name in named for axis in rules[name]]
    if len(set(used)) != len(used):
        raise ValueError(f"logical axes {tuple(logical_axes)} use one mesh axis twice: {used}")
    entries = [() if name is None else rules[name] for name in logical_axes]
    return P(*(None if not e else e[0] if len(e) == 1 else e for e in entries))


def on_mesh(
    logical_axes: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int]
) -> tuple[str | None, ...]:
    """The logical axes by which a parameter is sharded on a mesh of these sizes.

    If the product of the sizes of expert and fsdp divides the number of experts, fsdp shards the
    experts and not their width, so each device holds whole experts.  All-gathered experts then need
    no transpose.  Shards of the width did, in the optimizer's pass as well (20 of 338 ms per step
    of bench_olmoe_half on two H200s).
    """
    axes = tuple(logical_axes)
    if "experts" not in axes:
        return axes
    if shape[axes.index("experts")] % (sizes["expert"] * sizes["fsdp"]):
        return axes
    renamed = {"experts": "whole_experts", "expert_embed": None}
    return tuple(renamed.get(name, name) if name else None for name in axes)


def param_sharding(
    mesh: Mesh, logical_axes: Sequence[str | None], shape: Sequence[int]
) -> NamedSharding:
    """The NamedSharding of a parameter of this shape on `mesh`."""
    return sharding(mesh, on_mesh(logical_axes, shape, mesh.shape))


def sharding(mesh: Mesh, logical_axes: Sequence[str | None]) -> NamedSharding:
    """The NamedSharding of a tensor with these logical axes on `mesh`."""
    return NamedSharding(mesh, spec(logical_axes))


def constrain(
    x: jax.Array, mesh: Mesh | AbstractMesh | None, logical_axes: Sequence[str | None]
) -> jax.Array:
    """Constrain XLA to shard `x` by its logical axes; without a mesh XLA decides."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(logical_axes)))
