"""Output projection fused with cross-entropy, computing the logits in chunks.

There are two ways to cut the logits, with the same number of them in memory: by tokens (the
default: the same pass computes the gradients, three matmuls in all), and by vocabulary (four
matmuls, because a token's softmax is known only after its last class; better if a device holds few
tokens).

Axes: B rows, T positions, N tokens of one device, D width, V vocabulary, C chunks.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from moe_jax.parallel.mesh import BATCH_AXES
from moe_jax.registry import lookup


class CrossEntropy(NamedTuple):
    """Sums over the tokens in the mask.  Only `loss_sum` carries a gradient."""

    loss_sum: Float[Array, ""]  # nll_sum + z_weight * z_sum, to be minimised
    nll_sum: Float[Array, ""]  # sum of -log softmax of the targets, in nats
    z_sum: Float[Array, ""]  # sum of logsumexp(logits)^2
    count: Float[Array, ""]  # number of tokens in the mask


def cross_entropy(
    x_BTD: Float[Array, "B T D"],
    head_DV: Float[Array, "D V"],
    targets_BT: Int[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    *,
    z_weight: float,
    chunk: int,
    mesh: Mesh,
    implementation: str = "tokens",
) -> CrossEntropy:
    """The sums of -log softmax(x head)[target] and of the z-loss over the positions in the mask.

    Args:
      x_BTD: output of the last norm, rows split over the batch axes of `mesh`.
      head_DV: output projection; multiplied in x's dtype, with logits in float32 or wider.
      targets_BT: class of each position; any integer where the mask is False.
      mask_BT: True for positions in the loss.
      z_weight: weight of logsumexp^2 in `loss_sum` (PaLM, arXiv 2204.02311, section 5).
      chunk: float32 logits that one device holds at once, in multiples of V; there are at least
        two chunks.
      mesh: of the arrays; the vocabulary may be split over `tensor`.
      implementation: a key of CROSS_ENTROPY.

    Returns:
      Sums over all positions and devices: of the loss, of -log softmax in nats and of the z-loss.

    Raises:
      UserError: unknown implementation.

    Reference: PaLM, arXiv 2204.02311, section 5 (the loss and its z-loss).
    """
    function = lookup(CROSS_ENTROPY, implementation, "model.cross_entropy")
    local = functools.partial(function, z_weight=z_weight, chunk=chunk)

    def shard(x_BTD, head_DV, targets_BT, mask_BT):
        D = x_BTD.shape[-1]
        sums = local(x_BTD.reshape(-1, D), head_DV, targets_BT.reshape(-1), mask_BT.reshape(-1))
        return jax.lax.psum(sums, _row_axes(mesh))

    return _by_rows(shard, mesh, P())(x_BTD, head_DV, targets_BT, mask_BT)


def token_nll(
    x_BTD: Float[Array, "B T D"],
    head_DV: Float[Array, "D V"],
    targets_BT: Int[Array, "B T"],
    *,
    chunk: int,
    mesh: Mesh,
) -> Float[Array, "B T"]:
    """The value -log softmax(x head)[target] of every position, for evaluation.

    Args:
      x_BTD, head_DV, targets_BT, chunk, mesh: as in `cross_entropy`.

    Returns:
      Nats, float32 or wider [B, T].

    Reference: PaLM, arXiv 2204.02311, section 5, without the z-loss.
    """

    def shard(x_BTD, head_DV, targets_BT):
        D = x_BTD.shape[-1]
        chunks = _split(chunk, x_BTD.reshape(-1, D), targets_BT.reshape(-1))
        nll_CN = jax.lax.map(lambda one: _nll(*_logits(one[0], head_DV, one[1])), chunks)
        return nll_CN.reshape(-1)[: targets_BT.size].reshape(targets_BT.shape)

    return _by_rows(shard, mesh, P(_row_axes(mesh)))(x_BTD, head_DV, targets_BT)


def _by_rows(function: Callable, mesh: Mesh, out_spec: P) -> Callable:
    """Run `function(x, head, *per-token)` on each device's own rows; XLA partitions over `tensor`.

    If XLA partitioned it over the batch axes too, every chunk would reduce the head's gradient over
    them and chunking would move tokens between devices.  Here the gradient is reduced once.
    """

    axes = _row_axes(mesh)
    if not axes:
        return function
    rows = P(axes)

    def run(x_BTD, head_DV, *tokens):
        sharded = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(rows, P(), *(rows for _ in tokens)),
            out_specs=out_spec,
            axis_names=set(axes),
            check_vma=False,  # the scans start from constants, which do not vary over an axis
        )
        # jit, because jax 0.10 cannot run op by op a region that is manual over some axes only.
        return jax.jit(sharded)(x_BTD, head_DV, *tokens)

    return run


def _row_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes over which `_by_rows` is manual: none if only `tensor` has several devices.

    XLA rejects a region that is manual only over axes of one device.
    """
    tensor_alone = mesh.size == mesh.shape["tensor"] > 1
    return () if tensor_alone else BATCH_AXES


def _chunks(tokens: int, chunk: int) -> int:
    """The number of chunks of a device's logits: at least two, so that all never exist at once."""
    return max(2, -(-tokens // chunk))


def _split(chunk: int, *arrays: jax.Array) -> list[jax.Array]:
    """Reshape arrays over N tokens to [chunks, tokens], at most `chunk` each, zero-padded."""
    size = arrays[0].shape[0]
    chunks = _chunks(size, chunk)
    each = -(-size // chunks)
    widths = (0, chunks * each - size)
    padded = [jnp.pad(a, (widths, *((0, 0) for _ in a.shape[1:]))) for a in arrays]
    return [a.reshape(chunks, each, *a.shape[1:]) for a in padded]


def _logits(x_ND, head_DV, targets_N):
    """The logits in float32 or wider, and a mask [N, V] of each token's target."""
    wide = jnp.promote_types(x_ND.dtype, jnp.float32)
    head = head_DV.astype(x_ND.dtype)
    logits_NV = jnp.einsum("ND,DV->NV", x_ND, head, preferred_element_type=wide)
    hit_NV = jnp.arange(head.shape[-1]) == targets_N[:, None]
    return logits_NV, hit_NV


def _nll(logits_NV, hit_NV):
    # A masked sum, because a gather would not stay local if `tensor` splits the vocabulary.
    return jax.nn.logsumexp(logits_NV, axis=-1) - jnp.where(hit_NV, logits_NV, 0).sum(-1)


def _target_logits(logits_NV, targets_N, hit_NV):
    """The logit of each token's target, without gradient; any number for an invalid target.

    It is read by index, because a masked sum over all logits takes 0.7 ms per step of
    bench_olmoe_half on an H200.  If `tensor` splits the vocabulary, the masked sum is used, because
    it stays local.  If `tensor` is the only axis with several devices, `_by_rows` makes no
    shard_map region, so the vocabulary's split is not visible here.  The logit is read by index; a
    test checks that XLA then moves no logits between devices.
    """
    if jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1:
        return jnp.where(hit_NV, logits_NV, 0).sum(-1)
    return jnp.take_along_axis(logits_NV, targets_N[:, None], axis=1, mode="clip")[:, 0]


def full_cross_entropy(x_ND, head_DV, targets_N, mask_N, *, z_weight, chunk) -> CrossEntropy:
    """The reference: computes all logits at once; JAX differentiates it."""
    del chunk
    logits_NV, hit_NV = _logits(x_ND, head_DV, targets_N)
    lse_N = jax.nn.logsumexp(logits_NV, axis=-1)
    return _summed(_nll(logits_NV, hit_NV), lse_N, mask_N, z_weight)


def tokens_cross_entropy(x_ND, head_DV, targets_N, mask_N, *, z_weight, chunk) -> CrossEntropy:
    """Compute the logits of `chunk` tokens at a time, and the gradients in the forward pass.

    The loss is a sum, so its gradients are known up to one scalar before the backward pass begins.
    Each chunk turns its logits into d loss/d logits at once, so they are not recomputed (as in
    Liger's fused linear cross-entropy, https://arxiv.org/abs/2410.10989).
    """
    return _chunked(x_ND, head_DV, targets_N, mask_N, z_weight, chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunked(x_ND, head_DV, targets_N, mask_N, z_weight, chunk) -> CrossEntropy:
    return _chunked_forward(x_ND, head_DV, targets_N, mask_N, z_weight, chunk, False)[0]


def _chunked_forward(x_ND, head_DV, targets_N, mask_N, z_weight, chunk, gradients=True):
    wide, own = jnp.promote_types(x_ND.dtype, jnp.float32), head_DV.dtype
    head_DV = head_DV.astype(x_ND.dtype)  # here, because XLA does not move a cast out of a loop

    def one_chunk(carry, inputs):
        (nll, z, d_head), (x, targets, mask) = carry, inputs
        logits, hit = _logits(x, head_DV, targets)
        highest = logits.max(-1, keepdims=True)
        shifted = jnp.exp(logits - highest)
        total = shifted.sum(-1, keepdims=True)
        lse = jnp.log(total) + highest
        nll += jnp.where(mask, lse[:, 0] - _target_logits(logits, targets, hit), 0).sum()
        z += jnp.where(mask, lse[:, 0] ** 2, 0).sum()
        if not gradients:
            return (nll, z, d_head), None
        slope = (1 + 2 * z_weight * lse) / total
        d_logits = jnp.where(mask[:, None], shifted * slope - hit, 0).astype(x.dtype)
        d_x = jnp.einsum("NV,DV->ND", d_logits, head_DV)
        d_head += jnp.einsum("ND,NV->DV", x, d_logits, preferred_element_type=wide)
        return (nll, z, d_head), d_x

    zero = jnp.zeros((), wide)
    d_x: Any
    start = (zero, zero, jnp.zeros(head_DV.shape, wide) if gradients else zero)
    chunks = _split(chunk, x_ND, targets_N, mask_N)
    (nll, z, d_head), d_x = jax.lax.scan(one_chunk, start, chunks)
    out = CrossEntropy(nll + z_weight * z, nll, z, mask_N.sum().astype(wide))
    if not gradients:
        return out, None
    return out, (d_x.reshape(-1, x_ND.shape[1])[: x_ND.shape[0]], d_head.astype(own))


def _chunked_backward(z_weight, chunk, residuals, cotangents):
    del z_weight, chunk
    d_x, d_head = residuals
    scale = cotangents.loss_sum
    return (d_x * scale).astype(d_x.dtype), (d_head * scale).astype(d_head.dtype), None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def vocabulary_cross_entropy(x_ND, head_DV, targets_N, mask_N, *, z_weight, chunk) -> CrossEntropy:
    """Compute all tokens' logits for one part of the vocabulary at a time.

    The backward pass recomputes them.  The loop keeps a running maximum and a running sum of
    exponentials (the online softmax of https://arxiv.org/abs/1805.02867); the maximum gets no
    gradient.
    """
    wide = jnp.promote_types(x_ND.dtype, jnp.float32)
    (N, D), V = x_ND.shape, head_DV.shape[1]
    parts = _chunks(N, chunk)
    each = -(-V // parts)
    head_DCV = jnp.pad(head_DV, ((0, 0), (0, parts * each - V))).reshape(D, parts, each)
    first_C = jnp.arange(parts) * each
    wide_ND = x_ND.astype(wide)  # cast back inside the loop, so that gradients are summed in `wide`

    @jax.checkpoint
    def one_part(carry, inputs):
        (highest, total, target), (first, head) = carry, inputs
        logits, hit = _logits(wide_ND.astype(x_ND.dtype), head, targets_N - first)
        logits = jnp.where(jnp.arange(each) < V - first, logits, -jnp.inf)
        new = jax.lax.stop_gradient(jnp.maximum(highest, logits.max(-1)))
        total = total * jnp.exp(highest - new) + jnp.exp(logits - new[:, None]).sum(-1)
        return (new, total, target + jnp.where(hit, logits, 0).sum(-1)), None

    start = (jnp.full(N, -jnp.inf, wide), jnp.zeros(N, wide), jnp.zeros(N, wide))
    inputs = (first_C, head_DCV.swapaxes(0, 1))
    (highest, total, target), _ = jax.lax.scan(one_part, start, inputs)
    lse = highest + jnp.log(total)
    return _summed(lse - target, lse, mask_N, z_weight)


def _summed(nll_N, lse_N, mask_N, z_weight) -> CrossEntropy:
    nll, z = (jnp.where(mask_N, value, 0).sum() for value in (nll_N, lse_N**2))
    stop = jax.lax.stop_gradient
    return CrossEntropy(nll + z_weight * z, stop(nll), stop(z), mask_N.sum().astype(nll.dtype))


CROSS_ENTROPY: dict[str, Callable[..., CrossEntropy]] = {
    "full": full_cross_entropy,
    "tokens": tokens_cross_entropy,
    "vocabulary": vocabulary_cross_entropy,
}
