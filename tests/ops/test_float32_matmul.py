"""The router's matmul in bfloat16 parts against float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.float32_matmul import (
    float32_matmul,
    gradients_in_parts,
    in_parts,
    parts,
    plain,
)

D, E = 96, 5
# Error of float32 sums over D, relative to the largest result; a bfloat16 matmul's is 4e-3.
FLOAT32 = 2e-6


@pytest.fixture
def case():
    """Activations in bfloat16, weights and cotangent in float32; then all three in float64."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (3, 40, D), jnp.bfloat16)
    w = 0.02 * jax.random.normal(keys[1], (D, E))
    dy = 1e-4 * jax.random.normal(keys[2], (3, 40, E))
    return (x, w, dy), tuple(np.asarray(a).astype(np.float64) for a in (x, w, dy))


def close(found, expected, bound):
    worst = np.abs(np.asarray(found).astype(np.float64) - expected).max() / np.abs(expected).max()
    assert worst < bound, worst


def test_three_parts_are_the_number():
    """For both signs, small and large exponents, and ties between two bfloat16 numbers."""
    bits = jax.random.bits(jax.random.key(1), (4096,), jnp.uint32)
    a = jax.lax.bitcast_convert_type(bits, jnp.float32)
    a = jnp.where((jnp.abs(a) > 1e-20) & (jnp.abs(a) < 1e37), a, 1 + 2.0**-8)
    split = parts(a)
    assert all(part.dtype == jnp.bfloat16 for part in split)
    total = sum(np.asarray(part).astype(np.float64) for part in split)
    np.testing.assert_array_equal(total, np.asarray(a).astype(np.float64))


@pytest.mark.parametrize("product", [in_parts, plain, float32_matmul])
def test_the_product_is_one_of_float32(case, product):
    (x, w, _), (x64, w64, _) = case
    y = jax.jit(product)(x, w)
    assert y.dtype == jnp.float32 and y.shape == (3, 40, E)
    close(y, x64 @ w64, FLOAT32)


def test_gradients_in_parts(case):
    (x, w, dy), (x64, w64, dy64) = case
    dx, dw = jax.jit(gradients_in_parts)(x, w, dy)
    assert (dx.dtype, dw.dtype) == (x.dtype, w.dtype)
    close(dw, np.einsum("abd,abe->de", x64, dy64), FLOAT32)
    # The bound is bfloat16's rounding of each number, plus a small margin.
    exact = dy64 @ w64.T
    error = np.abs(np.asarray(dx).astype(np.float64) - exact)
    assert (error <= 2.0**-8 * np.abs(exact) * 1.01 + 2e-5 * np.abs(exact).max()).all()


def test_gradients_that_cancel_over_the_experts(case):
    """A softmax's gradients sum to 0, and columns of w may be nearly the same."""
    (x, w, dy), _ = case
    w, dy = w[:, :1] + 1e-4 * w, dy - dy.mean(-1, keepdims=True)
    dx, _ = jax.jit(gradients_in_parts)(x, w, dy)
    exact = np.asarray(dy).astype(np.float64) @ np.asarray(w).astype(np.float64).T
    error = np.asarray(dx).astype(np.float64) - exact
    assert np.sqrt((error**2).mean() / (exact**2).mean()) < 3e-3  # rounding dx is 1.7e-3


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_multiply_bfloat16_and_sum_in_float32(case, platform):
    (x, w, dy), _ = case

    def both(x, w, dy):
        y, pullback = jax.vjp(float32_matmul, x, w)
        return y, pullback(dy)

    text = jax.jit(both).trace(x, w, dy).lower(lowering_platforms=(platform,)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    types = [re.findall(r"x(bf16|f32)>", line) for line in products]
    assert types == [["bf16", "bf16", "f32"]] * 3


def test_gradients_are_those_of_the_plain_product(case):
    (x, w, dy), _ = case
    ours, theirs = (jax.vjp(product, x, w)[1](dy) for product in (float32_matmul, plain))
    for found, expected in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(found, expected)  # on a CPU the same program


def test_wider_activations_stay_wide(x64):
    x, w = jnp.ones((2, D), jnp.float64) / 3, jnp.ones((D, E), jnp.float64) / 7
    assert float32_matmul(x, w).dtype == jnp.float64
    close(float32_matmul(x, w), np.full((2, E), D / 21), 1e-14)
