"""Chunked cross-entropy against NumPy and against the reference, values and gradients."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.cross_entropy import CROSS_ENTROPY, cross_entropy, token_nll
from moe_jax.parallel.rules import sharding

B, T, D, V = 4, 9, 16, 34
CHUNKS = [4, 5, 9, 1000]  # 36 tokens: even, with a remainder, whole rows, one chunk


def make(dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (B, T, D), dtype)
    head = jax.random.normal(keys[1], (D, V), dtype)
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    return x, head, targets, targets > 3


def oracle(x, head, targets, mask, z_weight):
    """The loss sum and its gradients in NumPy float64, by the definition."""
    x, head = np.asarray(x, np.float64).reshape(-1, D), np.asarray(head, np.float64)
    targets, mask = np.asarray(targets).reshape(-1), np.asarray(mask).reshape(-1)
    logits = x @ head
    lse = np.log(np.exp(logits).sum(-1))
    nll = (lse - logits[np.arange(len(x)), targets]) * mask
    probs = np.exp(logits - lse[:, None])
    slope = probs * (1 + 2 * z_weight * lse[:, None]) - np.eye(V)[targets]
    slope *= mask[:, None]
    loss = nll.sum() + z_weight * (lse**2 * mask).sum()
    return loss, nll, (slope @ head.T).reshape(B, T, D), x.T @ slope


def gradients(mesh, chunk, implementation, x, head, targets, mask, z_weight, scale=1.0):
    def loss(x, head):
        out = cross_entropy(
            x,
            head,
            targets,
            mask,
            z_weight=z_weight,
            chunk=chunk,
            mesh=mesh,
            implementation=implementation,
        )
        return scale * out.loss_sum, out

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, head)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("z_weight", [0.0, 0.1])
@pytest.mark.parametrize("implementation", CROSS_ENTROPY)
def test_equals_the_definition(x64, mesh_of, implementation, z_weight, chunk):
    x, head, targets, mask = make()
    (_, out), (d_x, d_head) = gradients(
        mesh_of(), chunk, implementation, x, head, targets, mask, z_weight, scale=3.0
    )
    loss, nll, want_x, want_head = oracle(x, head, targets, mask, z_weight)
    assert out.loss_sum.dtype == jnp.float64
    np.testing.assert_allclose(out.loss_sum, loss, rtol=1e-12)
    np.testing.assert_allclose(out.nll_sum, nll.sum(), rtol=1e-12)
    assert out.count == np.asarray(mask).sum()
    np.testing.assert_allclose(d_x, 3 * want_x, atol=1e-12)
    np.testing.assert_allclose(d_head, 3 * want_head, atol=1e-12)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_token_nll(x64, mesh_of, chunk):
    x, head, targets, mask = make()
    want = oracle(x, head, targets, np.ones_like(mask), 0.0)[1]
    mesh = mesh_of(data=2)
    got = jax.jit(lambda *args: token_nll(*args, chunk=chunk, mesh=mesh))(x, head, targets)
    np.testing.assert_allclose(got, want.reshape(B, T), rtol=1e-12)


@pytest.mark.parametrize(
    "sizes",
    [{"data": 4}, {"tensor": 2}, {"data": 2, "expert": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}],
)
def test_same_on_every_mesh_and_tokens_stay_where_they_are(x64, mesh_of, sizes):
    x, head, targets, mask = make()
    alone = gradients(mesh_of(), 5, "tokens", x, head, targets, mask, 0.1)
    mesh = mesh_of(**sizes)
    rows = sharding(mesh, ("batch", None))
    x = jax.device_put(x, sharding(mesh, ("batch", None, None)))
    head = jax.device_put(head, sharding(mesh, ("embed", "vocab")))
    targets, mask = jax.device_put((targets, mask), rows)
    together = gradients(mesh, 5, "tokens", x, head, targets, mask, 0.1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), alone, together)

    def loss(x, head):
        sums = cross_entropy(x, head, targets, mask, z_weight=0.1, chunk=5, mesh=mesh)
        return sums.loss_sum, sums  # `sums` holds the targets' logits, which no gradient needs

    both = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    hlo = both.lower(x, head).compile().as_text()
    for moves_tokens in ("all-to-all(", "collective-permute("):
        assert moves_tokens not in hlo
    assert hlo.count("all-gather(") <= ("fsdp" in sizes)  # the head's shards, once


@pytest.mark.parametrize("implementation", CROSS_ENTROPY)
def test_masked_targets_may_be_anything(mesh_of, implementation):
    x, head, targets, mask = make(jnp.float32)
    wild = jnp.where(mask, targets, -(2**30))
    plain = gradients(mesh_of(), 5, implementation, x, head, targets, mask, 0.1)
    jax.tree.map(
        np.testing.assert_array_equal,
        plain,
        gradients(mesh_of(), 5, implementation, x, head, wild, mask, 0.1),
    )


def test_nothing_to_count_is_zero(mesh_of):
    x, head, targets, mask = make(jnp.float32)
    (_, out), grads = gradients(mesh_of(), 5, "tokens", x, head, targets, jnp.zeros_like(mask), 0.1)
    assert [float(v) for v in out] == [0, 0, 0, 0]
    assert all(not np.asarray(g).any() for g in grads)


@pytest.mark.parametrize("implementation", ["tokens", "vocabulary"])
def test_bfloat16_has_float32_logits_and_its_own_gradient_dtypes(mesh_of, implementation):
    x, head, targets, mask = make(jnp.float32)
    half = x.astype(jnp.bfloat16)
    (_, out), (d_x, d_head) = gradients(
        mesh_of(), 5, implementation, half, head, targets, mask, 0.0
    )
    assert out.loss_sum.dtype == d_head.dtype == jnp.float32
    assert d_x.dtype == jnp.bfloat16
    head = head.astype(jnp.bfloat16)
    loss, _, want_x, want_head = oracle(half.astype(jnp.float32), head, targets, mask, 0.0)
    np.testing.assert_allclose(out.loss_sum, loss, rtol=1e-6)
    np.testing.assert_allclose(d_x.astype(jnp.float32), want_x, atol=0.05)
    np.testing.assert_allclose(d_head, want_head, atol=0.05)


def compiled(mesh, tokens, vocab, chunk, implementation) -> str:
    x = jnp.zeros((4, tokens // 4, D))
    targets = jnp.zeros((4, tokens // 4), jnp.int32)

    def loss(x, head):
        return cross_entropy(
            x,
            head,
            targets,
            targets == 0,
            z_weight=0.0,
            chunk=chunk,
            mesh=mesh,
            implementation=implementation,
        ).loss_sum

    return jax.jit(jax.grad(loss, (0, 1))).lower(x, jnp.zeros((D, vocab))).compile().as_text()


@pytest.mark.parametrize(
    ("implementation", "chunk", "exists"),
    [
        ("tokens", 128, "[128,777]"),
        ("tokens", 4096, "[512,777]"),  # a chunk as large as the whole batch
        ("vocabulary", 128, "[1024,98]"),
        ("vocabulary", 4096, "[1024,389]"),
    ],
)
def test_all_logits_never_exist_at_once(mesh_of, implementation, chunk, exists):
    """The compiled step holds no array of all logits, whole or in chunks, only one chunk."""
    hlo = compiled(mesh_of(), 1024, 777, chunk, implementation)
    assert exists in hlo
    sizes = {math.prod(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", hlo)}
    assert max(sizes) < 1024 * 777
    control = compiled(mesh_of(), 1024, 777, chunk, "full")
    assert "[1024,777]" in control
