"""Float8 grouped matmuls against a loop over groups in NumPy on the same rounded operands."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_interpreter import interpreted
from grouped_cases import arrays, loop

from moe_jax.errors import UserError
from moe_jax.moe.components import make_components
from moe_jax.moe.config import MoEConfig
from moe_jax.moe.experts import Experts
from moe_jax.ops import float8
from moe_jax.ops.expert_activation import weighted_activate

N, D, F = 256, 128, 256
SIZES = [37, 0, 150, 60]  # nine rows are padding


@pytest.fixture(scope="module")
def operands():
    return tuple(jnp.asarray(a) for a in arrays(SIZES, N, D, F, np.float32))


def rounded(x, w):
    """x and w rounded to float8, scaled back, in float64."""
    x8, scale = (np.asarray(a, np.float64) for a in float8.round_rows(x))
    w8, scale_E = (np.asarray(a, np.float64) for a in float8.round_experts(w))
    return x8 * scale, w8 * scale_E[:, None, None]


def test_rounding_keeps_three_bits_of_every_row(operands):
    """For rows of any size; a row of zeros stays zero."""
    x = np.asarray(operands[0], np.float64)[: sum(SIZES)]
    x = jnp.asarray(x * np.logspace(-18, 18, len(x))[:, None], jnp.bfloat16).at[5].set(0)
    x8, scale = float8.round_rows(x)
    want = np.asarray(x, np.float64)
    found = np.asarray(x8, np.float64) * np.asarray(scale, np.float64)
    highest = np.abs(want).max(1, keepdims=True)
    # Half a unit of a 3-bit mantissa; for numbers below 2^-6 (of 448) half the smallest step.
    assert (np.abs(found - want) <= np.maximum(np.abs(want) / 16, highest * 2**-10 / 448)).all()
    assert (found[5] == 0).all() and np.isfinite(found).all()


def test_product_and_gradients(operands):
    """Forward and dx multiply rounded operands, dw unrounded ones; NaN in padding rows stays."""
    x, w, dy = operands
    owned, sizes_E = sum(SIZES), jnp.array(SIZES, jnp.int32)
    x8, w8 = rounded(x, w)
    dy8, _ = rounded(dy, w)
    y, pullback = jax.vjp(lambda x, w: float8.float8_grouped_matmul(x, w, sizes_E), x, w)
    dx, dw = pullback(dy)
    y8, dx8, _ = loop(x8, w8, dy8, SIZES)
    np.testing.assert_allclose(y[:owned], y8, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(dx[:owned], dx8, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(dw, loop(x, w, dy, SIZES)[2], rtol=1e-5, atol=1e-4)


def test_each_expert_has_its_own_scale():
    """A small expert beside a large one keeps its precision, also if the rows are small too."""
    x, w, _ = (jnp.asarray(a) for a in arrays([128, 128], N, D, F, np.float32))
    x, w = x * 1e-20, w * jnp.array([1.0, 1e-15])[:, None, None]
    y = float8.float8_grouped_matmul(x, w, jnp.array([128, 128], jnp.int32))
    expected = loop(x, w, np.zeros((N, F)), [128, 128])[0]
    for rows in (slice(0, 128), slice(128, 256)):
        error = np.linalg.norm(np.asarray(y[rows], np.float64) - expected[rows])
        assert error < 0.05 * np.linalg.norm(expected[rows])


def test_the_kernel_is_chosen_for_gpus(operands, monkeypatch):
    """The kernel runs if it supports the operands; here a sine marks its place in the program."""

    def kernel(x8, w8, sizes_E):
        del sizes_E
        return jnp.sin(jnp.zeros((x8.shape[0], w8.shape[1])))

    monkeypatch.setattr(float8, "choose", SimpleNamespace(supports=lambda x, w: True))
    monkeypatch.setattr(float8, "_kernel", kernel)
    x, w, _ = operands
    traced = jax.jit(float8.float8_grouped_matmul).trace(x, w, jnp.array(SIZES, jnp.int32))
    lowered = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cuda", "cpu")}
    assert "sine" in lowered["cuda"] and "sine" not in lowered["cpu"]


def test_experts_multiply_as_the_config_says():
    """The layer's experts in float8 are close to the compute dtype's result, but not equal."""
    rng = np.random.default_rng(0)
    w_in, w_out = rng.normal(size=(4, 128, 2, 64)), rng.normal(size=(4, 64, 128))
    x = jnp.asarray(rng.normal(size=(N, 128)), jnp.float32)

    def of(matmul):
        weights = (jnp.asarray(w, jnp.float32) for w in (w_in, w_out))
        return Experts(*weights, "swiglu", matmul).grouped(x, jnp.array(SIZES, jnp.int32))

    plain, rounded = (np.asarray(of(name))[: sum(SIZES)] for name in ("compute", "float8"))
    assert 0.01 < np.linalg.norm(rounded - plain) / np.linalg.norm(plain) < 0.1


def test_between_float8_products_no_kernel_stands(operands, monkeypatch):
    """Before a kernel XLA would write scaled copies of its operands: 5% of a step."""
    x, w, _ = operands
    asked = []

    def activate(name, h_NH, weights_N, used, kernel):
        asked.append(kernel)
        return weighted_activate(name, h_NH, weights_N, used, kernel)

    monkeypatch.setattr("moe_jax.moe.experts.weighted_activate", activate)
    w_in, w_out = (
        jnp.asarray(w, jnp.float32).reshape(*w.shape[:2], 2, -1),
        jnp.zeros((4, F // 2, D)),
    )
    for matmul in ("compute", "float8"):
        experts = Experts(w_in, w_out, "swiglu", matmul)
        experts.grouped(jnp.asarray(x, jnp.float32), jnp.array(SIZES, jnp.int32), jnp.ones(N))
    assert asked == [True, False]


def test_kernel_in_the_interpreter(operands, monkeypatch):
    """Run the kernel on float8 operands; if jax is too old for it, run the plain path."""
    x, w, _ = operands
    sizes_E = jnp.array(SIZES, jnp.int32)
    x8, _ = float8.round_rows(x)
    w8 = float8.round_experts(w)[0].swapaxes(1, 2)
    expected = loop(x8, np.swapaxes(np.asarray(w8, np.float64), 1, 2), np.zeros((N, F)), SIZES)[0]
    monkeypatch.setattr("moe_jax.ops.mosaic.ring.multiprocessors", lambda: 3)
    plain = functools.partial(float8._plain, jnp.bfloat16)
    found = interpreted(float8._kernel, plain, x8, w8, sizes_E)
    np.testing.assert_allclose(
        np.asarray(found, np.float64)[: sum(SIZES)], expected, rtol=2**-8, atol=1
    )


def test_other_dispatch_paths_refuse_it():
    with pytest.raises(UserError, match="dispatch capacity does not sort them"):
        make_components(MoEConfig(matmul="float8"))
