"""Builds and checks the context of MoE layers, called from a model or alone.

Axes: B rows, T positions per row.
"""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh

from moe_jax.errors import UserError
from moe_jax.moe.groups import fewest_rows
from moe_jax.moe.noise import row_keys
from moe_jax.moe.types import MoEContext, Router
from moe_jax.parallel.mesh import AXES, BATCH_AXES, check_mesh

# Kinds of array that an argument may be: the JAX dtype, and its name in error messages.
BOOLS, INTEGERS, FLOATS, KEYS = (
    (jnp.bool_, "bools"),
    (jnp.integer, "integers"),
    (jnp.floating, "floats"),
    (jax.dtypes.prng_key, "keys of jax.random.key"),
)


@dataclasses.dataclass(frozen=True)
class LayerNeeds:
    """The requirements of equal MoE layers on a context.

    Attributes:
      router: of each layer.
      title: name of the router in error messages.
      num_experts: E, routed experts.
      hidden: F, hidden width of one expert.
      dropout: the dropout rate of the experts' output.
      layers: number of layers that share the context, the leading axis of each router state; None:
        one layer, whose state has no such axis.
    """

    router: Router
    title: str
    num_experts: int
    hidden: int
    dropout: float
    layers: int | None = None


def call_context(
    like_BT: jax.Array,
    needs: LayerNeeds | None,
    *,
    mask_BT: jax.Array | None,
    token_ids_BT: jax.Array | None,
    key: jax.Array | None,
    router_state: Mapping[str, jax.Array] | None,
    mesh: Mesh | AbstractMesh | None,
    deterministic: bool,
) -> MoEContext:
    """Build the context of layers that are called without one; see `MoE.__call__`.

    Args:
      like_BT: an array whose first axes are rows and tokens.
      needs: of the layers; None: a model without experts.

    Raises:
      UserError: a key or state is missing, or the key is not a PRNG key.
    """
    B, T = like_BT.shape[:2]
    if needs is not None:
        title = needs.title
        missing = router_state is None or (isinstance(router_state, Mapping) and not router_state)
        if needs.router.state_specs(needs.num_experts) and missing:
            raise UserError(f"Router {title} keeps state: pass {_state_hint(needs)}.")
        if not deterministic and key is None and needs.router.random:
            raise UserError(
                f"Router {title} samples in training: pass key=, or deterministic=True."
            )
        if not deterministic and key is None and needs.dropout:
            raise UserError("expert_dropout samples in training: pass key=, or deterministic=True.")
    if key is None:
        key = jax.random.key(0)
    check_array("key", key, (), KEYS)
    if mesh is None:
        around = jax.sharding.get_abstract_mesh()
        # A shard_map of the caller makes its axes Manual: each device then runs the layer alone.
        free = AxisType.Manual not in around.axis_types
        mesh = around if tuple(around.axis_names) == AXES and free else None
    return MoEContext(
        token_ids_BT=jnp.zeros((B, T), jnp.int32) if token_ids_BT is None else token_ids_BT,
        mask_BT=jnp.ones((B, T), bool) if mask_BT is None else mask_BT,
        row_keys_B=row_keys(key, jnp.arange(B)),
        mesh=mesh,
        train=not deterministic,
        router_state={} if router_state is None else router_state,
    )


def check_call(
    like_BT: jax.Array,
    context: MoEContext,
    needs: LayerNeeds | None,
    replaced: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Raise UserError if a context does not fit the tokens or the layers.

    Args:
      like_BT: the tokens, an array whose first axes are rows and tokens.
      context: given by the caller, or made by `call_context`.
      needs: of the layers; None: a model without experts.
      replaced: arguments, by name, that a given context replaces; None: not given.
    """
    for name, value in replaced.items():
        if value is not None:
            raise UserError(
                f"context= replaces {name}=: set {name} in the context, or pass no context."
            )
    if not isinstance(context, MoEContext):
        raise UserError(
            f"context is {_form(context)}: pass a MoEContext, or mask_BT=, key= etc. instead."
        )
    B, T = like_BT.shape[:2]
    check_array("mask_BT", context.mask_BT, (B, T), BOOLS)
    check_array("token_ids_BT", context.token_ids_BT, (B, T), INTEGERS)
    check_array("row_keys_B", context.row_keys_B, (B,), KEYS)
    if context.sources_BT is not None:
        check_array("sources_BT", context.sources_BT, (B, T), INTEGERS)
    _check_meshes(like_BT, context.mesh)
    if needs is not None:
        _check_state(context.router_state, needs)
        _check_split(context.mesh, needs)


def check_array(name: str, value: object, shape: tuple[int, ...], kind: tuple[type, str]) -> None:
    """Raise UserError if an argument is not an array of this shape and kind.

    Args:
      name: of the argument.
      value: of the argument.
      shape: the required shape.
      kind: BOOLS, INTEGERS, FLOATS or KEYS.
    """
    if _shape(value) != shape or not _is_kind(value, kind):
        raise UserError(f"{name} is {_form(value)}: pass {kind[1]} of shape {list(shape)}.")


def check_tokens(
    what: str, value: object, shape: tuple[int | None, ...], kind: tuple[type, str]
) -> None:
    """Raise UserError if `value` is not tokens: wrong rank, width or kind, or zero tokens.

    Args:
      what: the start of the message: "MoE got x".
      value: an array whose first axes are rows and tokens.
      shape: the required shape; None on an axis: any size.
      kind: as in `check_array`.
    """
    got = _shape(value) or ()
    fits = len(got) == len(shape) and all(n in (None, m) for n, m in zip(shape, got, strict=True))
    if not fits or not _is_kind(value, kind):
        axes = ["rows", "tokens", *("width" if n is None else str(n) for n in shape[2:])]
        raise UserError(f"{what} {_form(value)}: pass {kind[1]} of shape [{', '.join(axes)}].")
    if 0 in got:
        raise UserError(f"{what} {_form(value)}: pass at least one row of one token.")


def _shape(value: object) -> tuple[int, ...] | None:
    """The shape; None if `value` is not an array."""
    return getattr(value, "shape", None)


def _is_kind(value: object, kind: tuple[type, str]) -> bool:
    dtype = getattr(value, "dtype", None)
    return dtype is not None and bool(jnp.issubdtype(dtype, kind[0]))


def _form(value: object) -> str:
    """The dtype and shape of an array, such as `float32[8, 12]`; the type of anything else."""
    shape = _shape(value)
    dtype = getattr(value, "dtype", "")
    return f"a {type(value).__name__}" if shape is None else f"{dtype}{list(shape)}"


def _check_meshes(like_BT: jax.Array, mesh: object) -> None:
    """Refuse a foreign mesh in the context, and Explicit axes on the meshes of the caller."""
    if mesh is not None:
        if not isinstance(mesh, Mesh | AbstractMesh):
            raise UserError(f"mesh is {_form(mesh)}: pass the result of moe_jax.make_mesh().")
        check_mesh(mesh)
    places = {
        "x is on a mesh": jax.typeof(like_BT).sharding.mesh,
        "jax.set_mesh set a mesh": jax.sharding.get_abstract_mesh(),
    }
    for place, found in places.items():
        axes = zip(found.axis_names, found.axis_types, strict=True)
        explicit = [str(name) for name, kind in axes if kind is AxisType.Explicit]
        if explicit:
            count = len(found.axis_names)
            auto = "(AxisType.Auto,)" + (f" * {count}" if count > 1 else "")
            raise UserError(
                f"{place} with Explicit axes ({', '.join(explicit)}): make it with "
                f"axis_types={auto}."
            )


def _check_state(state: object, needs: LayerNeeds) -> None:
    specs = needs.router.state_specs(needs.num_experts)
    if not isinstance(state, Mapping):
        raise UserError(f"router_state is {_form(state)}: pass {_state_hint(needs)}.")
    if state.keys() != specs.keys():
        keeps, has = (", ".join(sorted(names)) or "none" for names in (specs, state))
        hint = _state_hint(needs) if specs else "no router_state"
        raise UserError(
            f"Router {needs.title} keeps state {keeps}, but router_state has {has}: pass {hint}."
        )
    leading = () if needs.layers is None else (needs.layers,)
    for name, spec in specs.items():
        check_array(f"router_state[{name!r}]", state[name], (*leading, *spec.shape), FLOATS)


def _state_hint(needs: LayerNeeds) -> str:
    layers = "" if needs.layers is None else f".moe, {needs.layers}"
    return f"router_state=init_router_state(config{layers})"


def _check_split(mesh: Mesh | AbstractMesh | None, needs: LayerNeeds) -> None:
    """Refuse a mesh that does not split the experts, and their width, into equal parts."""
    sizes = {} if mesh is None else mesh.shape
    counts = {"expert": ("experts", needs.num_experts), "tensor": ("expert_width", needs.hidden)}
    for axis, (what, count) in counts.items():
        if count % sizes.get(axis, 1):
            raise UserError(
                f"The mesh has {axis}={sizes[axis]}, which does not divide {what} ({count}): make "
                f"the mesh with a divisor of {count}."
            )


def rows_in_group(
    rows: int,
    length: int,
    group_rows: int,
    choices: int,
    num_experts: int,
    mesh: Mesh | AbstractMesh | None,
) -> int:
    """The rows per routing group in a batch of `rows` rows.

    Args:
      rows: of the batch, on all devices.
      length: T, tokens per row.
      group_rows: as configured; 0: `fewest_rows`.
      choices: K, assignments per token.
      num_experts: E.
      mesh: over which the batch is split; None: not split.

    Raises:
      UserError: the mesh does not divide the rows, or the groups the rows per device.
    """
    sizes = {} if mesh is None else mesh.shape
    shards = math.prod(sizes.get(axis, 1) for axis in BATCH_AXES)
    if rows % shards:
        raise UserError(
            f"MoE got {rows} rows, split over {shards} devices: pass a multiple of {shards} rows."
        )
    group_rows = group_rows or fewest_rows(rows // shards, length, choices, num_experts)
    if rows // shards % group_rows:
        split = f" on each of {shards} devices" if shards > 1 else ""
        raise UserError(
            f"MoE got {rows // shards} rows{split}, which group_rows ({group_rows}) does not "
            f"divide: pass a multiple of {group_rows * shards} rows, or set MoEConfig.group_rows."
        )
    return group_rows
