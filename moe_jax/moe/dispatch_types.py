"""What a dispatch path is given beside tokens and their choice, and what it answers about itself.

Axes: G routing groups, S tokens in a group, R rows in a group, E experts, K choices per token,
N rows of one expert or of all, D model width.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Bool


@dataclasses.dataclass(frozen=True)
class DispatchIn:
    """What a dispatch path is given beside the tokens and the choice."""

    mask_GS: Bool[Array, "G S"]  # real tokens
    rows: int  # R, rows in a group
    train: bool  # the capacity factor is that of training
    mesh: (
        Mesh | AbstractMesh | None
    )  # None: XLA splits the layer as it splits the caller's own model
    slots: int | None = None  # of an expert in a group; None: the router does not bound them

    @property
    def expert_shards(self) -> int:
        """Devices over which the experts are split."""
        return 1 if self.mesh is None else self.mesh.shape["expert"]


@dataclasses.dataclass(frozen=True)
class LayerSizes:
    """Sizes of one MoE layer in a microbatch, from which a path accounts for what it does."""

    tokens: int  # of one device
    group_tokens: int  # S, tokens in a group
    choices: int  # K, choices per token
    experts: int  # E, of all shards
    expert_shards: int  # devices over which the experts are split


class Exchange(NamedTuple):
    """How tokens reach experts on other devices, and how their outputs come back.

    `rows` is what one device holds of the buffer that an all-to-all exchanges, or what it
    contributes to an all-gather and gets from a reduce-scatter.
    """

    dispatch: str  # "all-to-all" or "all-gather"
    combine: str  # "all-to-all" or "reduce-scatter"
    rows: int  # of width D


@runtime_checkable
class Experts(Protocol):
    """The experts as a dispatch path sees them: a pytree of weights with two pure functions."""

    @property
    def num_experts(self) -> int:
        """The number of experts that these weights hold (inside shard_map: the local ones)."""
        ...

    def border_specs(self) -> Any:
        """PartitionSpecs at the border of a dispatch region.

        Returns:
          A pytree like the weights, split over expert and tensor only.
        """
        ...

    def packs(self, rows: int) -> bool:
        """True where `grouped` is as fast per row as `batched`.

        Args:
          rows: N, of all experts of this device.

        Returns:
          False where the grouped matmul has no kernels for these shapes.
        """
        ...

    def batched(self, x_END: jax.Array, weights_EN: jax.Array | None = None) -> jax.Array:
        """Expert e on rows x_END[e].

        Args:
          x_END: N rows for each expert.
          weights_EN: by which each row's output is multiplied; None: by 1.

        Returns:
          [E, N, D]; under tensor parallelism the partial sum of this shard.
        """
        ...

    def grouped(
        self, x_ND: jax.Array, sizes_E: jax.Array, weights_N: jax.Array | None = None
    ) -> jax.Array:
        """Expert e on its sizes_E[e] consecutive rows.

        Args:
          x_ND: rows, sorted by expert.
          sizes_E: int32 rows of each expert.
          weights_N: by which each row's output is multiplied; None: by 1.

        Returns:
          [N, D]; rows past the sum of the sizes are unspecified.
        """
        ...
