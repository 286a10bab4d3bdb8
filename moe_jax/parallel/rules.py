"""THE table from logical axes to mesh axes."""

from collections.abc import Mapping, Sequence

from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.parallel.mesh import AXES, BATCH_AXES

MeshAxes = tuple[str, ...]

# Logical axis -> mesh axes.  Weights shard one large dimension over fsdp and one over tensor;
# expert weights also over expert.  `expert_embed` differs from `embed` only in name: inside the
# dispatch region the fsdp shards of expert weights are gathered at its border.
RULES: dict[str, MeshAxes] = {
    "batch": BATCH_AXES,
    "group": BATCH_AXES,
    "length": (),
    "embed": ("fsdp",),
    "expert_embed": ("fsdp",),
    "experts": ("expert",),
    "router_experts": (),
    "expert_mlp": ("tensor",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "vocab": ("tensor",),
    "norm": (),
    "layers": (),
    "activation_embed": (),
}


def check_rules(rules: Mapping[str, MeshAxes]) -> None:
    """Raises ValueError for a mesh axis that does not exist or stands twice in one entry."""
    for name, axes in rules.items():
        unknown = [axis for axis in axes if axis not in AXES]
        if unknown:
            raise ValueError(f"logical axis {name!r} maps to unknown mesh axes {unknown}")
        if len(set(axes)) != len(axes):
            raise ValueError(f"logical axis {name!r} repeats a mesh axis: {axes}")


check_rules(RULES)


def spec(logical_axes: Sequence[str | None], rules: Mapping[str, MeshAxes] = RULES) -> P:
    """PartitionSpec for a tensor with these logical axes (None: not split).

    Raises ValueError for an unknown name, a name repeated in one tensor, or two names that land
    on one mesh axis.
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


def sharding(mesh: Mesh, logical_axes: Sequence[str | None]) -> NamedSharding:
    """NamedSharding of a tensor with these logical axes on `mesh`."""
    return NamedSharding(mesh, spec(logical_axes))
