"""The config of the decoder-only Transformer."""

import dataclasses
from typing import Annotated

from moe_jax import bounds
from moe_jax.bounds import above, at_least, at_most, one_of
from moe_jax.decides import Data, Run, Training, Weights
from moe_jax.errors import UserError
from moe_jax.moe.config import MoEConfig
from moe_jax.nn.remat import REMAT
from moe_jax.ops.attention import ATTENTION
from moe_jax.ops.cross_entropy import CROSS_ENTROPY

ACTIVATIONS = ("swiglu", "gelu")
MAX_LAYERS = 2048  # each layer costs tracing time: with a million, start-up would hang
QK_NORMS = ("none", "head", "full")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Decoder-only Transformer: RMSNorm, RoPE, grouped-query attention, dense or MoE FFNs.

    For a dense model set `dense = True`, not `moe.every = 0`.

    Raises:
      UserError: a value out of range, an unknown name, or sizes that do not divide each other.

    Reference: RMSNorm, arXiv 1910.07467; RoPE, arXiv 2104.09864; SwiGLU, arXiv 2002.05202.
    """

    vocab_size: Weights[Annotated[int, at_least(0)]] = (
        0  # V, tokens in the vocabulary; 0: that of the tokenizer
    )
    # L, blocks of attention and FFN.
    num_layers: Weights[Annotated[int, at_least(1), at_most(MAX_LAYERS)]] = 4
    width: Weights[Annotated[int, at_least(1)]] = 256  # D, of the residual stream
    num_heads: Weights[Annotated[int, at_least(1)]] = 4  # H, query heads
    num_kv_heads: Weights[Annotated[int, at_least(1)]] = 4  # J, key/value heads; divides H
    head_dim: Weights[Annotated[int, at_least(1)]] = 64  # A, width of a head; even, for RoPE
    ffn_width: Weights[Annotated[int, at_least(1)]] = 1024  # F of the dense FFNs
    # Activation of dense FFNs and experts; gelu has no gate.
    activation: Weights[Annotated[str, one_of(ACTIVATIONS)]] = "swiglu"
    # RMSNorm of queries and keys: none | head (Qwen3) | full (over the whole projection: OLMoE).
    qk_norm: Weights[Annotated[str, one_of(QK_NORMS)]] = "none"
    tied_head: Weights[bool] = False  # the output head is the embedding's transpose
    # Base of the rotary frequencies.
    rope_theta: Weights[Annotated[float, above(0)]] = 10_000.0
    # Added to the mean square in RMSNorm.
    norm_eps: Weights[Annotated[float, at_least(0)]] = 1e-5
    dense: Weights[bool] = False  # every FFN is dense; `moe` is ignored
    # The kernel: xla (any device) | cudnn (NVIDIA) | splash (TPU) | auto (by device and shape).
    attention: Run[Annotated[str, one_of(("auto", *ATTENTION))]] = "auto"
    confine_attention: Data[bool] = False  # attention (and targets) stop at document borders
    scan_layers: Run[bool] = False  # scan the repeating period of layers instead of unrolling it
    # What the backward pass recomputes: none (nothing) | full (all) | dots (all but matmuls without
    # batch axes; the experts' matmuls are recomputed) | save_dispatch (all but routing and
    # dispatch) | save_hidden (all but routing, dispatch and the hidden activations of attention,
    # FFNs and experts).
    remat: Run[Annotated[str, one_of(REMAT)]] = "none"
    # Axis along which the loss computes logits in chunks: tokens | vocabulary | full (no chunks).
    cross_entropy: Run[Annotated[str, one_of(CROSS_ENTROPY)]] = "tokens"
    # Logits in memory at once on a device, in multiples of the vocabulary size.
    loss_chunk: Run[Annotated[int, at_least(1)]] = 2048
    # Weight of the mean logsumexp(logits)^2 in the loss (PaLM, arXiv 2204.02311, section 5);
    # 0: off.
    logits_z_weight: Training[Annotated[float, at_least(0)]] = 0.0
    moe: MoEConfig = MoEConfig()  # the layers that hold experts

    def __post_init__(self):
        bounds.check(self, "model.")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"config.model.num_heads ({self.num_heads}) is not divisible by "
                f"model.num_kv_heads ({self.num_kv_heads}). Set a multiple of {self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise UserError(f"config.model.head_dim is {self.head_dim}: RoPE needs an even number.")

    @property
    def moe_layers(self) -> int:
        """The number of layers that hold experts."""
        return sum(self.is_moe(layer) for layer in range(self.num_layers))

    def is_moe(self, layer: int) -> bool:
        """True for a layer that holds experts.

        Args:
          layer: its index, from 0.

        Returns:
          False for a layer with a dense FFN.
        """
        moe = self.moe
        return not self.dense and layer >= moe.first_dense and (layer + 1) % moe.every == 0
