"""What a layer that stands alone is called with, and one sentence for what does not fit."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh
from jaxtyping import Array, Bool, Int

from moe_jax.errors import UserError
from moe_jax.moe.groups import fewest_rows
from moe_jax.moe.noise import row_keys
from moe_jax.moe.types import MoEContext, Router
from moe_jax.parallel.mesh import AXES, BATCH_AXES


def call_context(
    like_BT: jax.Array,
    router: Router,
    title: str,
    dropout: float,
    *,
    mask_BT: Bool[Array, "B T"] | None,
    token_ids_BT: Int[Array, "B T"] | None,
    key: jax.Array | None,
    router_state: Mapping[str, jax.Array] | None,
    mesh: Mesh | AbstractMesh | None,
    train: bool,
) -> MoEContext:
    """The context of layers that are called without one; see `MoE.__call__`.

    Args:
      like_BT: an array whose first axes are rows and tokens.
      router: of the layer; `title` names it to a person.
      dropout: of the experts' output.
      train: whether noise and dropout are drawn.

    Raises:
      UserError: a mesh, key or state that does not fit, and what to pass instead.
    """
    B, T = like_BT.shape[:2]
    specs = router.state_specs(1)
    if specs and not router_state:
        raise UserError(f"Router {title} keeps state: pass router_state=init_router_state(config).")
    if train and key is None and router.random:
        raise UserError(f"Router {title} samples in training: pass key=, or deterministic=True.")
    if train and key is None and dropout:
        raise UserError("expert_dropout draws in training: pass key=, or deterministic=True.")
    key = jax.random.key(0) if key is None else key
    return MoEContext(
        token_ids_BT=jnp.zeros((B, T), jnp.int32) if token_ids_BT is None else token_ids_BT,
        mask_BT=jnp.ones((B, T), bool) if mask_BT is None else mask_BT,
        row_keys_B=row_keys(key, jnp.arange(B)),
        mesh=_mesh_of(like_BT, mesh),
        train=train,
        router_state=router_state or {},
    )


def _mesh_of(like_BT: jax.Array, mesh: Mesh | AbstractMesh | None) -> Mesh | AbstractMesh | None:
    """The mesh that was passed, else that of `jax.set_mesh` if it is one of ours, else none."""
    if mesh is not None and tuple(mesh.axis_names) != AXES:
        raise UserError(
            f"The mesh has axes {tuple(mesh.axis_names)} but expert parallelism needs "
            f"{', '.join(AXES)}: use moe_jax.make_mesh(), or pass no mesh."
        )
    around = jax.sharding.get_abstract_mesh()
    ours = not around.empty and tuple(around.axis_names) == AXES
    found = mesh if mesh is not None else around if ours else None
    lies_on = found if found is not None else jax.typeof(like_BT).sharding.mesh
    names = zip(lies_on.axis_names, lies_on.axis_types, strict=True)
    explicit = [str(name) for name, kind in names if kind is AxisType.Explicit]
    if explicit:
        raise UserError(
            f"x lies on a mesh with Explicit axes ({', '.join(explicit)}): make it with "
            f"axis_types=(AxisType.Auto,) * {len(lies_on.axis_names)}."
        )
    return found


def rows_in_group(
    rows: int,
    length: int,
    group_rows: int,
    choices: int,
    num_experts: int,
    mesh: Mesh | AbstractMesh | None,
) -> int:
    """Rows in a routing group of a batch of `rows` rows: `group_rows`, 0: the fewest that will do.

    Raises:
      UserError: the groups do not divide the rows that a device holds.
    """
    sizes = {} if mesh is None else mesh.shape
    shards = math.prod(sizes.get(axis, 1) for axis in BATCH_AXES)
    if rows % shards:
        raise UserError(
            f"MoE got {rows} rows for {shards} devices: pass a multiple of {shards} rows."
        )
    group_rows = group_rows or fewest_rows(rows // shards, length, choices, num_experts)
    if rows // shards % group_rows:
        split = f" on each of {shards} devices" if shards > 1 else ""
        raise UserError(
            f"MoE got {rows // shards} rows{split}, which group_rows ({group_rows}) does not "
            f"divide: pass a multiple of {group_rows * shards} rows, or set MoEConfig.group_rows."
        )
    return group_rows
