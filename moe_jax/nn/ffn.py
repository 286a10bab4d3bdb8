"""The dense feed-forward network.  Axes: B rows, T positions, D width, F hidden width."""

import functools

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_jax.nn.params import fan_in, param, param_dtype, residual_fan_in
from moe_jax.nn.remat import FFN_HIDDEN
from moe_jax.ops.linear import linear


class DenseFFN(nnx.Module):
    """A two-layer FFN: SwiGLU (https://arxiv.org/abs/2002.05202), or GELU without a gate."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: str,
        depth: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        """Draw the parameters.

        Args:
          width: D.
          hidden: F.
          activation: "swiglu", or "gelu" without a gate.
          depth: layers of the model, for the initial values of the output projection.
          dtype: of the computation; parameters are float32 or wider.
          rngs: draws the initial values (stream `params`).
        """
        D, F, own = width, hidden, param_dtype(dtype)
        into, out = ("embed", "mlp"), ("mlp", "embed")
        matrix = functools.partial(param, rngs, dtype=own, group="ffn", compute_dtype_only=True)
        self.w_in_DF = matrix("w_in", (D, F), into, fan_in(D))
        self.w_gate_DF = (
            matrix("w_gate", (D, F), into, fan_in(D)) if activation == "swiglu" else None
        )
        self.w_out_FD = matrix("w_out", (F, D), out, residual_fan_in(F, depth))

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        up_BTF = _project(x_BTD, self.w_in_DF)
        if self.w_gate_DF is None:
            hidden_BTF = jax.nn.gelu(up_BTF)
        else:
            hidden_BTF = jax.nn.silu(_project(x_BTD, self.w_gate_DF)) * up_BTF
        return linear(hidden_BTF, self.w_out_FD[...].astype(x_BTD.dtype))


def _project(x_BTD: Float[Array, "B T D"], w_DF: nnx.Param) -> Float[Array, "B T F"]:
    """Tag the product before the activation, whose gradient needs it: remat can then save it."""
    h_BTF = linear(x_BTD, w_DF[...].astype(x_BTD.dtype))
    return checkpoint_name(h_BTF, FFN_HIDDEN)
