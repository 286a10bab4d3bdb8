"""The experts: their weights and two pure functions, batched and grouped.

Axes: E experts, N rows of one expert (batched) or of all (grouped), D model width, F hidden width,
U matrices of the first layer: 2 for a gated activation (gate first, then up), else 1.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from moe_jax.nn.remat import MOE_HIDDEN
from moe_jax.ops.expert_activation import activate, weighted_activate
from moe_jax.ops.float8 import float8_grouped_matmul
from moe_jax.ops.grouped_matmul import grouped_matmul
from moe_jax.ops.mosaic import choose


class _Matmul(NamedTuple):
    """A grouped matmul, and whether the activation between two of them may be a Pallas kernel.

    For float8 the activation stays with XLA, which fuses the output scaling into it.  Before a
    Pallas kernel, XLA would write a scaled copy: 21 ms of a 471 ms step (bench_mixtral_2b, 16
    rows).  The price is 8 ms: XLA runs the activation as two kernels.
    """

    multiply: Callable[..., jax.Array]
    kernel: bool


# model.moe.matmul -> its grouped matmul
_MATMUL = {
    "compute": _Matmul(grouped_matmul, kernel=True),
    "float8": _Matmul(float8_grouped_matmul, kernel=False),
}


@dataclasses.dataclass(frozen=True)
class Experts:
    """Two-layer experts.

    Gate and up share one matmul.  U is an axis of its own, not part of F, so that a tensor shard
    holds the same columns of both.
    """

    w_in_EDUF: Float[Array, "E D U F"]
    w_out_EFD: Float[Array, "E F D"]
    activation: str
    matmul: str = "compute"  # a key of _MATMUL

    @property
    def num_experts(self) -> int:
        """The number of experts in these weights; inside shard_map, of this shard."""
        return self.w_in_EDUF.shape[0]

    def border_specs(self) -> "Experts":
        """The PartitionSpecs at the border of a dispatch region, over expert and tensor only."""
        return Experts(
            w_in_EDUF=P("expert", None, None, "tensor"),  # pyright: ignore[reportArgumentType]
            w_out_EFD=P("expert", "tensor", None),  # pyright: ignore[reportArgumentType]
            activation=self.activation,
            matmul=self.matmul,
        )

    def has_grouped_kernel(self, rows: int) -> bool:
        """True if the grouped-matmul kernel supports `rows` rows of this shape on this device."""
        E, D, U, F = self.w_in_EDUF.shape
        dtype = self.w_in_EDUF.dtype
        shapes = (D, (E, D, U * F)), (F, self.w_out_EFD.shape)
        return all(
            choose.supports(
                jax.ShapeDtypeStruct((rows, depth), dtype), jax.ShapeDtypeStruct(weights, dtype)
            )
            for depth, weights in shapes
        )

    def batched(
        self, x_END: Float[Array, "E N D"], weights_EN: Float[Array, "E N"] | None = None
    ) -> Float[Array, "E N D"]:
        """Apply expert e to the rows x_END[e], and multiply by the rows' weights."""
        with jax.named_scope("experts"):
            return self._batched(x_END, weights_EN)

    def _batched(self, x_END, weights_EN):
        E, D, U, F = self.w_in_EDUF.shape
        h_ENF = jnp.einsum("end,edf->enf", x_END, self.w_in_EDUF.reshape(E, D, U * F))
        h_ENF = checkpoint_name(h_ENF, MOE_HIDDEN)
        a_ENF = self._hidden(h_ENF, weights_EN)
        return jnp.einsum("enf,efd->end", a_ENF, self.w_out_EFD)

    def grouped(
        self,
        x_ND: Float[Array, "N D"],
        sizes_E: Int[Array, "E"],
        weights_N: Float[Array, "N"] | None = None,
    ) -> Float[Array, "N D"]:
        """Apply expert e to its sizes_E[e] consecutive rows, and multiply by the rows' weights.

        Rows >= the sum of the sizes are padding: their outputs are unspecified.
        """
        with jax.named_scope("experts"):
            return self._grouped(x_ND, sizes_E, weights_N)

    def _grouped(self, x_ND, sizes_E, weights_N):
        E, D, U, F = self.w_in_EDUF.shape
        multiply = _MATMUL[self.matmul].multiply
        h_NF = multiply(x_ND, self.w_in_EDUF.reshape(E, D, U * F), sizes_E)
        h_NF = checkpoint_name(h_NF, MOE_HIDDEN)
        a_NF = self._hidden(h_NF, weights_N, sizes_E.sum())
        return multiply(a_NF, self.w_out_EFD, sizes_E)

    def _hidden(self, h, weights, used=None):
        """The input of the second matmul, already multiplied by the rows' weights."""
        if weights is None:
            return activate(self.activation, h)
        return weighted_activate(self.activation, h, weights, used, _MATMUL[self.matmul].kernel)


jax.tree_util.register_dataclass(
    Experts, data_fields=["w_in_EDUF", "w_out_EFD"], meta_fields=["activation", "matmul"]
)
