"""One pre-norm Transformer block.  B rows, T positions, D model width."""

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_jax.model.attention import Attention, AttentionConfig
from moe_jax.model.config import ModelConfig
from moe_jax.model.rope import Rope
from moe_jax.moe.accounting import branch_scale
from moe_jax.moe.components import Components
from moe_jax.moe.layer import MoE
from moe_jax.moe.types import MoEAux, MoEContext
from moe_jax.nn.ffn import DenseFFN
from moe_jax.nn.norms import RMSNorm
from moe_jax.nn.params import scoped


class Block(nnx.Module):
    """Computes x + attention(norm(x)), then x + ffn(norm(x)); the FFN is dense or an MoE layer."""

    def __init__(
        self,
        config: ModelConfig,
        components: Components | None,
        *,
        layer: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        """Make the parameters; `components` are those of the MoE layers, None in a dense model."""
        D, eps = config.width, config.norm_eps
        self.attention_norm = RMSNorm(D, "norm", eps=eps, dtype=dtype, rngs=rngs)
        self.attention = Attention(
            _attention_config(config), layer=layer, dtype=dtype, rngs=scoped(rngs, "attention")
        )
        self.ffn_norm = RMSNorm(D, "norm", eps=eps, dtype=dtype, rngs=rngs)
        ffn_rngs = scoped(rngs, "ffn")
        if components is not None and config.is_moe(layer):
            self.ffn = MoE(
                config.moe,
                D,
                activation=config.activation,
                depth=config.num_layers,
                router=components.router,
                dispatch=components.dispatch,
                dtype=dtype,
                rngs=ffn_rngs,
            )
        else:
            self.ffn = DenseFFN(
                D,
                config.ffn_width,
                activation=config.activation,
                depth=config.num_layers,
                dtype=dtype,
                rngs=ffn_rngs,
            )

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rope: Rope,
        segments_BT: Int[Array, "B T"] | None,
        context: MoEContext,
    ) -> tuple[Float[Array, "B T D"], MoEAux | None]:
        """Compute the new residual stream and MoEAux (None for a dense FFN).

        `segments_BT` confines attention to documents; None: attention crosses document borders.
        """
        normed = self.attention_norm(x_BTD)
        with jax.named_scope("attention"):
            x_BTD = x_BTD + self.attention(normed, rope, segments_BT, context.mesh)
        normed = self.ffn_norm(x_BTD)
        if isinstance(self.ffn, DenseFFN):
            with jax.named_scope("ffn"):
                return x_BTD + self.ffn(normed), None
        out_BTD, aux = self.ffn(normed, context)
        aux = aux._replace(scale=branch_scale(out_BTD, x_BTD, context.mask_BT))
        return x_BTD + out_BTD, aux


def _attention_config(config: ModelConfig) -> AttentionConfig:
    return AttentionConfig(
        width=config.width,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        qk_norm=config.qk_norm,
        norm_eps=config.norm_eps,
        implementation=config.attention,
        depth=config.num_layers,
    )
