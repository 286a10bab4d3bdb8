"""The weighted activation between an expert's matmuls against its definition in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_interpreter import INTERPRETED, interpreted
from jax.sharding import PartitionSpec

from moe_jax.ops.expert_activation import (
    ACTIVATE,
    _mosaic,
    _mosaic_backward,
    plain_backward,
    plain_forward,
    supports,
    weighted_activate,
)
from moe_jax.ops.mosaic import choose

N = 6


def operands(name: str, columns: int, dtype):
    """Random (da, h, weights); one weight is zero, one negative."""
    keys = jax.random.split(jax.random.key(columns), 3)
    da_NF = jax.random.normal(keys[0], (N, columns), dtype)
    h_NH = jax.random.normal(keys[1], (N, columns * ACTIVATE[name][0]), dtype)
    weights_N = jax.random.uniform(keys[2], (N,), jnp.promote_types(dtype, jnp.float32))
    return da_NF, h_NH, weights_N.at[2].set(0.0).at[3].set(-0.5)


def numpy_swiglu(h_NH, weights_N):
    gate, up = np.split(np.asarray(h_NH, np.float64), 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up * np.asarray(weights_N, np.float64)[..., None]


def test_forward_is_the_definition():
    _, h_NH, weights_N = operands("swiglu", 10, jnp.float32)
    found = np.asarray(weighted_activate("swiglu", h_NH, weights_N))
    np.testing.assert_allclose(found, numpy_swiglu(h_NH, weights_N), rtol=1e-5, atol=1e-6)


def test_bfloat16_is_rounded_once():
    """The error is at most half a unit in the last place; rounding twice would exceed that."""
    _, h_NH, weights_N = operands("swiglu", 4096, jnp.bfloat16)
    found = np.asarray(weighted_activate("swiglu", h_NH, weights_N), np.float64)
    exact = numpy_swiglu(h_NH, weights_N)
    assert found.dtype == np.float64 and np.abs(found - exact).max() > 0
    np.testing.assert_allclose(found, exact, rtol=2**-8 * 1.001, atol=1e-30)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ACTIVATE)
@pytest.mark.parametrize("shape", [(N,), (2, 3)])  # rows of a grouped matmul, and slots
def test_gradients_are_those_of_the_product(name, shape):
    da_NF, h_NH, weights_N = operands(name, 10, jnp.float64)
    da, h, weights = (a.reshape(*shape, *a.shape[1:]) for a in (da_NF, h_NH, weights_N))
    _, pullback = jax.vjp(lambda h, w: weighted_activate(name, h, w), h, weights)
    U, function = ACTIVATE[name]

    def product(h_NH, weights_N):
        return function(*jnp.split(h_NH, U, axis=1)) * weights_N[:, None]

    _, expected_pullback = jax.vjp(product, h_NH, weights_N)
    for found, expected in zip(pullback(da), expected_pullback(da_NF), strict=True):
        assert np.asarray(expected).any()
        np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=0, atol=1e-14)


def test_weights_gradient_sums_in_float32():
    """A bfloat16 sum over F would lose the router's gradient."""
    h_NH = jnp.concatenate([jnp.full((N, 1000), 1e4), jnp.ones((N, 1000))], 1).astype(jnp.bfloat16)
    one = h_NH[0, 0].astype(jnp.float32)
    _, pullback = jax.vjp(lambda w: weighted_activate("swiglu", h_NH, w), jnp.ones(N))
    (found,) = pullback(jnp.ones((N, 1000), jnp.bfloat16))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 1000 * one, rtol=1e-6)


def kernels(da, h, weights, used=None):
    """Run both kernels in the interpreter: (a, dh, dweights)."""
    forward, backward = (functools.partial(f, "swiglu") for f in (plain_forward, plain_backward))
    a = interpreted(_mosaic, forward, h, weights, used)
    return a, *interpreted(_mosaic_backward, backward, da, h, weights, used)


@pytest.mark.parametrize("columns", [128, 384, 1024, 3 * 1024])  # one chunk and several
@pytest.mark.parametrize("shape", [(N,), (2, 3)])
def test_kernels_are_the_plain_passes(columns, shape):
    operands_ = operands("swiglu", columns, jnp.bfloat16)
    da, h, weights = (a.reshape(*shape, *a.shape[1:]) for a in operands_)
    found = kernels(da, h, weights)
    expected = plain_forward("swiglu", h, weights), *plain_backward("swiglu", da, h, weights)
    assert [a.shape for a in found] == [a.shape for a in expected]
    assert [a.dtype for a in found] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    a, dh, dweights = (np.asarray(a, np.float32) for a in expected)
    # Both compute in float32 and round once, so they may differ only in the rounding of a tie.
    for made, wanted in zip(found[:2], (a, dh), strict=True):
        np.testing.assert_allclose(np.asarray(made, np.float32), wanted, rtol=2**-7, atol=1e-6)
        assert wanted.any(-1).sum() == N - 1  # one row's weight is zero
    np.testing.assert_allclose(found[2], dweights, rtol=1e-5, atol=1e-4)
    assert dweights.all()


def test_kernels_keep_each_row_to_itself():
    """A row's result does not depend on other rows, and large gates do not overflow."""
    da_NF, h_NH, weights_N = operands("swiglu", 128, jnp.bfloat16)
    h_NH = h_NH.at[0].mul(1000).at[1].mul(-1000)
    alone = [np.asarray(a, np.float32) for a in kernels(da_NF, h_NH, weights_N)]
    assert all(np.isfinite(a).all() for a in alone)
    poisoned = da_NF.at[4:].set(jnp.nan), h_NH.at[4:].set(jnp.nan), weights_N
    for found, expected in zip(kernels(*poisoned), alone, strict=True):
        found = np.asarray(found, np.float32)
        np.testing.assert_array_equal(found[:4], expected[:4])
        assert np.isnan(found[4:]).all()


@pytest.mark.parametrize("used", [0, 4, N])
def test_kernels_leave_the_rows_of_nobody_alone(used):
    """The kernels do not write padding rows: they stay NaN, as the interpreter's buffers begin.

    An older jax runs the reference, which computes all rows.
    """
    all_rows = operands("swiglu", 256, jnp.bfloat16)
    expected = [np.asarray(a, np.float32) for a in kernels(*all_rows)]
    for found, wanted in zip(kernels(*all_rows, jnp.int32(used)), expected, strict=True):
        found = np.asarray(found, np.float32)
        np.testing.assert_array_equal(found[:used], wanted[:used])
        if INTERPRETED:
            assert np.isnan(found[used:]).all()


def test_used_rows_have_their_gradients():
    da_NF, h_NH, weights_N = operands("swiglu", 10, jnp.float32)

    def gradients(*used):
        forward = functools.partial(weighted_activate, "swiglu")
        return jax.vjp(lambda h, w: forward(h, w, *used), h_NH, weights_N)[1](da_NF)

    for found, expected in zip(gradients(jnp.int32(4)), gradients(), strict=True):
        np.testing.assert_array_equal(found[:4], expected[:4])


@pytest.mark.parametrize(
    ("name", "columns", "dtype", "weights", "chosen"),
    [
        ("swiglu", 256, jnp.bfloat16, jnp.float32, True),
        ("swiglu", 128, jnp.bfloat16, jnp.float32, False),
        ("swiglu", 256, jnp.float32, jnp.float32, False),
        ("swiglu", 256, jnp.bfloat16, jnp.bfloat16, False),
        ("gelu", 256, jnp.bfloat16, jnp.float32, False),
    ],
)
def test_what_the_kernel_takes(monkeypatch, name, columns, dtype, weights, chosen):
    h_NH, weights_N = jnp.zeros((N, columns), dtype), jnp.zeros(N, weights)
    assert not supports(name, h_NH, weights_N), "chosen without a GPU"
    monkeypatch.setattr(choose, "runs_here", lambda: True)
    assert supports(name, h_NH, weights_N) is chosen


@pytest.mark.parametrize("kernel", [True, False])
def test_a_gpu_gets_the_kernel_inside_shard_map(monkeypatch, mesh_of, kernel):
    """A program lowered for CUDA (without a GPU) has the kernel; one for a CPU has not."""
    new = jax.__version_info__ >= choose.FIRST_JAX
    monkeypatch.setattr(choose, "runs_here", lambda: new)
    mesh, rows = mesh_of(data=2), PartitionSpec("data")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=rows, out_specs=rows)
    def gradients(da_NF, h_NH, weights_N):
        a_NF, backward = jax.vjp(
            lambda h, w: weighted_activate("swiglu", h, w, jnp.int32(2), kernel), h_NH, weights_N
        )
        return a_NF, *backward(da_NF)

    traced = gradients.trace(*operands("swiglu", 256, jnp.bfloat16))
    programs = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cuda", "cpu")}
    assert programs["cuda"].count("@mosaic_gpu") == 2 * (new and kernel)
    assert "mosaic_gpu" not in programs["cpu"]
    narrow = gradients.trace(*operands("swiglu", 64, jnp.bfloat16))
    assert "mosaic_gpu" not in narrow.lower(lowering_platforms=("cuda",)).as_text()
