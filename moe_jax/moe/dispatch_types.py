"""Types that dispatch paths take (inputs, experts) and with which they describe themselves.

Axes: G routing groups, S tokens per group, R rows per group, E experts, K assignments per token, N
rows of one expert or of all, D model width.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Bool


@dataclasses.dataclass(frozen=True)
class DispatchIn:
    """The inputs of a dispatch path besides the tokens, their choice and the experts."""

    mask_GS: Bool[Array, "G S"]  # True for real tokens, False for padding
    rows: int  # R, rows per group
    train: bool  # True: the capacity factor of training; False: that of evaluation
    mesh: (
        Mesh | AbstractMesh | None
    )  # None: XLA splits the layer as it splits the caller's own model
    slots: int | None = None  # per expert per group, set by the router; None: by the path

    @property
    def expert_shards(self) -> int:
        """Number of devices over which the experts are split."""
        return 1 if self.mesh is None else self.mesh.shape["expert"]


@dataclasses.dataclass(frozen=True)
class LayerSizes:
    """Sizes of one MoE layer in a microbatch, from which a path derives buffers and traffic."""

    tokens: int  # of one device
    group_tokens: int  # S, tokens per group
    choices: int  # K, assignments per token
    experts: int  # E, of all shards
    expert_shards: int  # devices over which the experts are split


class Exchange(NamedTuple):
    """The collectives that move tokens to experts on other devices, and the outputs back.

    `rows` counts one device's rows of the buffer that an all-to-all exchanges, or the rows that it
    contributes to an all-gather and gets from a reduce-scatter.
    """

    dispatch: str  # "all-to-all" or "all-gather"
    combine: str  # "all-to-all" or "reduce-scatter"
    rows: int  # of width D


@runtime_checkable
class ExpertFunctions(Protocol):
    """The experts that a dispatch path calls: a pytree of weights with two pure functions."""

    @property
    def num_experts(self) -> int:
        """The number of experts in these weights (inside shard_map: of this shard)."""
        ...

    def border_specs(self) -> Any:
        """The PartitionSpecs of the weights at the border of a dispatch region.

        Returns:
          A pytree like the weights, split over expert and tensor only.
        """
        ...

    def has_grouped_kernel(self, rows: int) -> bool:
        """True if `grouped` is as fast per row as `batched`.

        Args:
          rows: N, of all experts of this device.

        Returns:
          False if the grouped matmul has no kernels for these shapes.
        """
        ...

    def batched(self, x_END: jax.Array, weights_EN: jax.Array | None = None) -> jax.Array:
        """Apply expert e to the rows x_END[e].

        Args:
          x_END: N rows for each expert.
          weights_EN: factors of the rows' outputs; None: 1.

        Returns:
          [E, N, D]; under tensor parallelism the partial sum of this shard.
        """
        ...

    def grouped(
        self, x_ND: jax.Array, sizes_E: jax.Array, weights_N: jax.Array | None = None
    ) -> jax.Array:
        """Apply expert e to its sizes_E[e] consecutive rows.

        Args:
          x_ND: rows, sorted by expert.
          sizes_E: number of rows of each expert, int32.
          weights_N: factors of the rows' outputs; None: 1.

        Returns:
          [N, D]; rows >= the sum of the sizes are padding and unspecified.
        """
        ...
