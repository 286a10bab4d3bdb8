"""Causal grouped-query attention: a plain XLA reference and the fast path of each platform.

Axes: B rows, T query positions, S key positions (S = T), H query heads, J key/value heads (query
head h reads key/value head h // (H/J)), G = H/J query heads per key/value head, A head width.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_jax.errors import UserError
from moe_jax.parallel.mesh import BATCH_AXES
from moe_jax.parallel.xla_flags import kernels_are_deterministic
from moe_jax.registry import lookup

_MAX_CHUNKS = 8
_MIN_CHUNK = 32
_SPLASH_BLOCK = 128  # splash attention needs a multiple of this many positions


def attention(
    q_BTHA: Float[Array, "B T H A"],
    k_BTJA: Float[Array, "B T J A"],
    v_BTJA: Float[Array, "B T J A"],
    segments_BT: Int[Array, "B T"] | None,
    mesh: Mesh | AbstractMesh | None,
    implementation: str = "auto",
    layer: int = 0,
) -> Float[Array, "B T H A"]:
    """The causal attention softmax(q k^T / sqrt(A)) v.

    Args:
      q_BTHA, k_BTJA, v_BTJA: queries, keys, values; J divides H.
      segments_BT: a query attends only to keys of its own segment; None: all up to its position.
        Padding is a segment too, so its outputs are finite, and real tokens never attend to it.
      mesh: batch is split over data x fsdp x expert, heads over tensor.  None or abstract: XLA
        partitions the attention with the caller's code, which only the reference allows.
      implementation: a key of ATTENTION, or "auto": the fastest for the platform and dtype.
      layer: the layer's number from 0; it does not change the result.  In a program that takes
        gradients, layers must have different numbers unless `layers_share_calls` (see
        `cudnn_attention`).

    Returns:
      [B, T, H, A]: weighted values of every query head, in the dtype of the queries.

    Raises:
      UserError: unknown implementation.

    Reference: Vaswani et al., arXiv 1706.03762, equation 1; grouped queries, arXiv 2305.13245.
    """
    if not isinstance(mesh, Mesh):
        implementation = "xla"
    elif implementation == "auto":
        implementation = best_attention(mesh, q_BTHA)
    function = lookup(ATTENTION, implementation, "model.attention")
    return function(q_BTHA, k_BTJA, v_BTJA, segments_BT, mesh, layer)


def layers_share_calls() -> bool:
    """True if several layers may use the same trace of `attention`; see `cudnn_attention`."""
    return not kernels_are_deterministic()


def check_attention(implementation: str, platform: str, T: int, dtype: DTypeLike) -> None:
    """Raise UserError if the implementation that the config names cannot run.

    Args:
      implementation: a key of ATTENTION, or "auto".
      platform: of the mesh's devices.
      T: positions per row.
      dtype: compute dtype of the model.
    """
    home = {"cudnn": "gpu", "splash": "tpu"}.get(implementation, platform)
    if platform != home:
        raise UserError(
            f"model.attention is {implementation!r}, which runs on {home} only, and the devices "
            f"are {platform}. Set it to 'auto'."
        )
    if implementation == "cudnn" and not _half(dtype):
        raise UserError(
            "model.attention is 'cudnn', for 16-bit dtypes only. Set precision bfloat16."
        )
    if implementation == "splash" and T % _SPLASH_BLOCK:
        raise UserError(
            f"data.sequence_length is {T}: model.attention 'splash' needs a multiple of "
            f"{_SPLASH_BLOCK}. Set a multiple, or model.attention 'auto'."
        )


def _half(dtype: DTypeLike) -> bool:
    return dtype in (jnp.bfloat16, jnp.float16)


def best_attention(mesh: Mesh, q_BTHA: jax.Array) -> str:
    """The key of ATTENTION that "auto" selects."""
    platform = mesh.devices.flat[0].platform
    half = _half(q_BTHA.dtype)
    if platform == "gpu" and half:
        return "cudnn"
    if platform == "tpu" and half and q_BTHA.shape[1] % _SPLASH_BLOCK == 0:
        return "splash"
    return "xla"


def xla_attention(q_BTHA, k_BTJA, v_BTJA, segments_BT, mesh, layer) -> jax.Array:
    """The reference, with scores and softmax in float32, or in the inputs' dtype if wider.

    Queries are cut into a few static chunks, each multiplied with the keys up to its end, so most
    of the upper triangle of the scores is never computed.  The division by the softmax's sum comes
    after the product with v, where it costs A divisions per query instead of T.  On 2 CPU cores at
    B8 T256 H4 A64, forward and backward take 18 ms; without chunks, 24 ms.
    """
    del mesh, layer
    B, T, H, A = q_BTHA.shape
    J = k_BTJA.shape[2]
    q_BJGTA = q_BTHA.reshape(B, T, J, H // J, A).transpose(0, 2, 3, 1, 4)
    k_BJSA = k_BTJA.transpose(0, 2, 1, 3)
    v_BJSA = v_BTJA.transpose(0, 2, 1, 3)
    size = T // _chunks(T)
    out = [
        _attend(q_BJGTA, k_BJSA, v_BJSA, segments_BT, start, start + size)
        for start in range(0, T, size)
    ]
    return jnp.concatenate(out, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, H, A)


def _chunks(length: int) -> int:
    """The number of equal chunks of queries, a function of the length alone."""
    fits = (n for n in range(_MAX_CHUNKS, 1, -1) if length % n == 0 and length // n >= _MIN_CHUNK)
    return next(fits, 1)


def _attend(q_BJGTA, k_BJSA, v_BJSA, segments_BT, start: int, end: int):
    """The attention of queries [start, end) to keys [0, end)."""
    wide = jnp.promote_types(q_BJGTA.dtype, jnp.float32)
    q, k, v = q_BJGTA[..., start:end, :], k_BJSA[:, :, :end], v_BJSA[:, :, :end]
    scores = jnp.einsum("BJGTA,BJSA->BJGTS", q, k, preferred_element_type=wide)
    scores = scores / math.sqrt(q.shape[-1])
    seen = jnp.arange(start, end)[:, None] >= jnp.arange(end)
    if segments_BT is not None:
        same_BTS = segments_BT[:, start:end, None] == segments_BT[:, None, :end]
        seen = (seen & same_BTS)[:, None, None]
    scores = jnp.where(seen, scores, jnp.finfo(wide).min)
    highest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - highest)  # the largest is 1, so the sum is at least 1
    out = jnp.einsum("BJGTS,BJSA->BJGTA", weights.astype(v.dtype), v, preferred_element_type=wide)
    return (out / weights.sum(-1, keepdims=True)).astype(q.dtype)


def cudnn_attention(q_BTHA, k_BTJA, v_BTJA, segments_BT, mesh, layer) -> jax.Array:
    """cuDNN's flash attention (NVIDIA, bfloat16 or float16); pjit can partition it.

    It takes no segment ids, so attention inside documents materialises a [B, T, T] mask.
    """
    del mesh
    same = None
    scale = 1 / math.sqrt(q_BTHA.shape[-1])
    if not layers_share_calls():
        # Two equal backward passes in one program end the run with "raw_hash_map<>::at": XLA marks
        # only the first as deterministic, so it does not find the kernel compiled for the second
        # (jax 0.11.2, openxla/xla pull request 46500).  Each layer gets a different float64 scale,
        # which rounds to the same float32, the dtype that cuDNN takes.
        scale *= 1 + layer * 2.0**-44
    if segments_BT is not None:
        same = (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q_BTHA, k_BTJA, v_BTJA, mask=same, scale=scale, is_causal=True, implementation="cudnn"
    )


def splash_attention(q_BTHA, k_BTJA, v_BTJA, segments_BT, mesh, layer) -> jax.Array:
    """Splash attention (TPU), in shard_map because XLA cannot partition a Mosaic kernel."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    del layer
    heads = q_BTHA.shape[2] // mesh.shape["tensor"]
    T, A = q_BTHA.shape[1], q_BTHA.shape[3]
    mask = masks.MultiHeadMask([masks.CausalMask((T, T))] * heads)
    run = kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1)

    def one_row(q_THA, k_TJA, v_TJA, segments_T):
        by_head = functools.partial(jnp.swapaxes, axis1=0, axis2=1)
        ids = None if segments_T is None else kernel.SegmentIds(segments_T, segments_T)
        q_HTA = by_head(q_THA) / math.sqrt(A)  # the kernel does not scale
        out_HTA: Any = run(q_HTA, by_head(k_TJA), by_head(v_TJA), segment_ids=ids)
        return by_head(out_HTA)

    rows = P(BATCH_AXES, None, "tensor", None)
    segments = None if segments_BT is None else P(BATCH_AXES, None)
    sharded = jax.shard_map(
        jax.vmap(one_row, in_axes=(0, 0, 0, None if segments_BT is None else 0)),
        mesh=mesh,
        in_specs=(rows, rows, rows, segments),
        out_specs=rows,
        check_vma=False,  # pallas_call does not declare varying axes
    )
    return sharded(q_BTHA, k_BTJA, v_BTJA, segments_BT)


ATTENTION: dict[str, Callable[..., jax.Array]] = {
    "xla": xla_attention,
    "cudnn": cudnn_attention,
    "splash": splash_attention,
}
