"""The self-attention layer: projections, q/k norm, RoPE, attention, output projection.

B rows, T positions, D model width, H query heads, J key/value heads, A head width.
"""

import dataclasses
import functools

from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_jax.model.rope import Rope, apply_rope
from moe_jax.nn.norms import RMSNorm
from moe_jax.nn.params import fan_in, param, param_dtype, residual_fan_in, scoped
from moe_jax.nn.remat import ATTENTION_OUT
from moe_jax.ops.attention import attention
from moe_jax.ops.linear import linear


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """The part of a model config that one attention layer needs."""

    width: int  # D
    num_heads: int  # H
    num_kv_heads: int  # J
    head_dim: int  # A
    qk_norm: str = "none"  # none | head | full, as in ModelConfig
    norm_eps: float = 1e-5
    implementation: str = "auto"  # a key of ATTENTION, or auto
    depth: int = 1  # layers of the model; scales the initial output projection


class Attention(nnx.Module):
    """Causal grouped-query attention with H query and J key/value heads of width A."""

    def __init__(self, config: AttentionConfig, *, layer: int, dtype: DTypeLike, rngs: nnx.Rngs):
        D, A = config.width, config.head_dim
        H, J = config.num_heads, config.num_kv_heads
        self.implementation, self.layer = config.implementation, layer
        query, key_value = ("heads", "head_dim"), ("kv_heads", "head_dim")
        matrix = functools.partial(
            param, rngs, dtype=param_dtype(dtype), group="attention", compute_dtype_only=True
        )
        self.q_DHA = matrix("q", (D, H, A), ("embed", *query), fan_in(D))
        self.k_DJA = matrix("k", (D, J, A), ("embed", *key_value), fan_in(D))
        self.v_DJA = matrix("v", (D, J, A), ("embed", *key_value), fan_in(D))
        out_init = residual_fan_in(H * A, config.depth)
        self.o_HAD = matrix("o", (H, A, D), (*query, "embed"), out_init)
        self.q_norm = _qk_norm(config, H, "heads", dtype, scoped(rngs, "q_norm"))
        self.k_norm = _qk_norm(config, J, "kv_heads", dtype, scoped(rngs, "k_norm"))

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rope: Rope,
        segments_BT: Int[Array, "B T"] | None,
        mesh: Mesh | AbstractMesh | None,
    ) -> Float[Array, "B T D"]:
        dtype = x_BTD.dtype
        q_BTHA = linear(x_BTD, self.q_DHA[...].astype(dtype))
        k_BTJA = linear(x_BTD, self.k_DJA[...].astype(dtype))
        v_BTJA = linear(x_BTD, self.v_DJA[...].astype(dtype))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHA, k_BTJA = _normed(self.q_norm, q_BTHA), _normed(self.k_norm, k_BTJA)
        q_BTHA, k_BTJA = apply_rope(q_BTHA, rope), apply_rope(k_BTJA, rope)
        out_BTHA = attention(
            q_BTHA, k_BTJA, v_BTJA, segments_BT, mesh, self.implementation, self.layer
        )
        out_BTHA = checkpoint_name(out_BTHA, ATTENTION_OUT)
        w_oD = self.o_HAD[...].astype(dtype).reshape(-1, x_BTD.shape[-1])
        return linear(out_BTHA.reshape(*x_BTD.shape[:2], -1), w_oD)


def _qk_norm(
    config: AttentionConfig, heads: int, axis: str, dtype: DTypeLike, rngs: nnx.Rngs
) -> RMSNorm | None:
    """Make the norm of queries or keys: none, per head (Qwen3), or over all heads (OLMoE)."""
    if config.qk_norm == "none":
        return None
    size, axis = {
        "head": (config.head_dim, "head_dim"),
        "full": (heads * config.head_dim, axis),
    }[config.qk_norm]
    return RMSNorm(size, axis, eps=config.norm_eps, dtype=dtype, rngs=rngs)


def _normed(norm: RMSNorm, x_BTHA: Float[Array, "B T H A"]) -> Float[Array, "B T H A"]:
    """Apply `norm` per head, or over all heads if it has a weight for each of their elements."""
    parts = x_BTHA.reshape(*x_BTHA.shape[:2], -1, norm.weight.shape[0])
    return norm(parts).reshape(x_BTHA.shape)
