"""Shape of the decoder-only Transformer."""

import dataclasses

from moe_jax.decides import Data, Run, Training, Weights
from moe_jax.errors import UserError
from moe_jax.moe.config import MoEConfig
from moe_jax.nn.remat import REMAT
from moe_jax.ops.attention import ATTENTION
from moe_jax.ops.cross_entropy import CROSS_ENTROPY
from moe_jax.registry import lookup

ACTIVATIONS = ("swiglu", "gelu")
MOST_LAYERS = 2048  # each costs time before it costs memory: a million would hang
QK_NORMS = ("none", "head", "full")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Decoder-only Transformer: RMSNorm, RoPE, grouped-query attention, dense or MoE FFNs.

    `moe.every = 0` is not used for a dense model: set `dense = True`.

    Raises:
      UserError: a value out of range, an unknown name, or sizes that do not divide each other.

    Reference: RMSNorm, arXiv 1910.07467; RoPE, arXiv 2104.09864; SwiGLU, arXiv 2002.05202.
    """

    vocab_size: Weights[int] = 0  # V; 0: the tokenizer's
    num_layers: Weights[int] = 4  # L, blocks of attention and FFN
    width: Weights[int] = 256  # D, of the residual stream
    num_heads: Weights[int] = 4  # H, query heads
    num_kv_heads: Weights[int] = 4  # J, key/value heads; divides H
    head_dim: Weights[int] = 64  # A, width of a head; even
    ffn_width: Weights[int] = 1024  # F of the dense FFNs
    activation: Weights[str] = "swiglu"  # swiglu | gelu (no gate), for dense FFNs and experts alike
    qk_norm: Weights[str] = "none"  # none | head (Qwen3) | full (over the whole projection: OLMoE)
    tied_head: Weights[bool] = False  # the output head is the embedding's transpose
    rope_theta: Weights[float] = 10_000.0  # base of the rotary frequencies
    norm_eps: Weights[float] = 1e-5  # added to the mean square in RMSNorm
    dense: Weights[bool] = False  # every FFN is dense; `moe` is ignored
    attention: Run[str] = "auto"  # auto | xla | cudnn | splash
    confine_attention: Data[bool] = False  # attention (and targets) stop at document borders
    scan_layers: Run[bool] = False  # scan the repeating period instead of unrolling it
    remat: Run[str] = "none"  # none | full | a policy of nn/remat.py by name
    # How its logits are cut: tokens | vocabulary | full (not at all).
    cross_entropy: Run[str] = "tokens"
    # Logits that exist at once on a device, in multiples of the vocabulary.
    loss_chunk: Run[int] = 2048
    # Of the mean logsumexp(logits)^2 in the loss (PaLM, arXiv 2204.02311, section 5); 0: off.
    logits_z_weight: Training[float] = 0.0
    moe: MoEConfig = MoEConfig()  # of the layers that hold experts

    def __post_init__(self):
        for name in ("num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "ffn_width"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}: set 1 or more.")
        if self.num_layers > MOST_LAYERS:
            raise UserError(f"model.num_layers is {self.num_layers}: set at most {MOST_LAYERS}.")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_heads ({self.num_heads}) is not divisible by model.num_kv_heads "
                f"({self.num_kv_heads}): make it a multiple."
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim is {self.head_dim}: RoPE needs an even number.")
        if not self.rope_theta > 0 or self.norm_eps < 0:
            raise UserError("model.rope_theta must be above 0 and model.norm_eps 0 or more.")
        if self.vocab_size < 0 or self.loss_chunk < 1:
            raise UserError("model.vocab_size must be 0 or more and model.loss_chunk 1 or more.")
        tables = {
            "activation": ACTIVATIONS,
            "qk_norm": QK_NORMS,
            "attention": ("auto", *ATTENTION),
            "cross_entropy": CROSS_ENTROPY,
            "remat": REMAT,
        }
        for name, known in tables.items():
            lookup(dict.fromkeys(known), getattr(self, name), f"model.{name}")

    @property
    def moe_layers(self) -> int:
        """The number of layers that hold experts."""
        return sum(self.is_moe(layer) for layer in range(self.num_layers))

    def is_moe(self, layer: int) -> bool:
        """True for a layer that holds experts.

        Args:
          layer: its number, from 0.

        Returns:
          False for a layer with a dense FFN.
        """
        moe = self.moe
        return not self.dense and layer >= moe.first_dense and (layer + 1) % moe.every == 0
