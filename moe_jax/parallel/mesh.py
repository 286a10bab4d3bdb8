"""Builds the device mesh; no other module makes one."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from moe_jax import bounds
from moe_jax.bounds import Limit
from moe_jax.decides import Run
from moe_jax.errors import UserError

AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")  # the batch is sharded over these, in this order
SIZE = Limit("1 or more, or -1 for the rest", lambda size: size == -1 or size >= 1)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes, in devices; at most one may be -1, meaning the devices that remain.

    Raises:
      UserError: a size is neither -1 nor at least 1, or more than one is -1.
    """

    data: Run[Annotated[int, SIZE]] = -1  # replicas of the parameters, each with its own rows
    fsdp: Run[Annotated[int, SIZE]] = 1  # shards of the parameters, each with its own rows
    expert: Run[Annotated[int, SIZE]] = 1  # shards of the experts, each with its own rows
    # Shards of heads, hidden widths and vocabulary; they share the same rows.
    tensor: Run[Annotated[int, SIZE]] = 1

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        bounds.check(self, "mesh.")
        if list(sizes.values()).count(-1) > 1:
            raise UserError("config.mesh has more than one axis of size -1: set all but one.")

    def resolve(self, num_devices: int) -> "MeshConfig":
        """Replace -1 by the number of devices that remain.

        Args:
          num_devices: number of devices of the mesh, over all processes.

        Returns:
          Sizes whose product is the number of devices.

        Raises:
          UserError: the product differs from the number of devices.
        """
        sizes = dataclasses.asdict(self)
        fixed = math.prod(size for size in sizes.values() if size != -1)
        free = [name for name, size in sizes.items() if size == -1]
        if free and num_devices % fixed == 0:
            return dataclasses.replace(self, **{free[0]: num_devices // fixed})
        if fixed != num_devices or free:
            text = " x ".join(f"{name} {size}" for name, size in sizes.items())
            raise UserError(
                f"mesh {text} does not multiply to the {num_devices} devices present: "
                f"change config.mesh or the number of devices."
            )
        return self

    def __str__(self) -> str:
        """The axes of size above 1, such as "data 2 x expert 4"; "of one device" if there are none.

        Call it after `resolve`.
        """
        sizes = dataclasses.asdict(self)
        split = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        return split or "of one device"

    @property
    def batch_shards(self) -> int:
        """The number of shards of the batch (after `resolve`)."""
        return self.data * self.fsdp * self.expert


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[Any] | None = None) -> Mesh:
    """Make a mesh with the axes data, fsdp, expert and tensor, all of them Auto.

    Args:
      config: sizes of the axes; by default all devices are on `data`.
      devices: the devices to use; None: every device of every process.

    Returns:
      A mesh over the devices; on TPUs in an order that follows the torus.

    Raises:
      UserError: the product of the sizes is not the number of devices.
    """
    devices = list(devices if devices is not None else jax.devices())
    config = config.resolve(len(devices))
    shape = tuple(dataclasses.asdict(config)[name] for name in AXES)
    types = (AxisType.Auto,) * len(AXES)
    if devices[0].platform == "tpu":  # the order on the torus decides which links a collective uses
        # Splitting a torus axis between mesh axes permits any sizes with the right product.
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=types)
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=types)


def check_mesh(mesh: Mesh | AbstractMesh) -> None:
    """Raise UserError if `make_mesh` could not have made this mesh; it says what to change."""
    if tuple(mesh.axis_names) != AXES:
        raise UserError(
            f"The mesh has axes {tuple(mesh.axis_names)} but expert parallelism needs "
            f"{', '.join(AXES)}: use moe_jax.make_mesh(), or pass no mesh."
        )
    if any(kind is not AxisType.Auto for kind in mesh.axis_types):  # jax.make_mesh's default
        raise UserError(
            f"The mesh has axes that are not Auto: make it with axis_types=(AxisType.Auto,) * "
            f"{len(AXES)}, or use moe_jax.make_mesh()."
        )
