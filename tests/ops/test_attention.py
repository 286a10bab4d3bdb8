"""Attention against a loop over queries in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.test_util import check_grads

from moe_jax.errors import UserError
from moe_jax.ops.attention import attention, best_attention


def oracle(q_BTHA, k_BTJA, v_BTJA, segments_BT):
    """Attention of one query at a time; q, k, v are NumPy float64."""
    B, T, H, A = q_BTHA.shape
    share = H // k_BTJA.shape[2]
    out = np.zeros_like(q_BTHA)
    for b, t, h in np.ndindex(B, T, H):
        seen = [s for s in range(t + 1) if segments_BT[b, s] == segments_BT[b, t]]
        scores = k_BTJA[b, seen, h // share] @ q_BTHA[b, t, h] / np.sqrt(A)
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights / weights.sum() @ v_BTJA[b, seen, h // share]
    return out


def run(q, k, v, segments, mesh):
    """Run the reference under jit."""
    return jax.jit(lambda *x: attention(*x, segments, mesh, "xla"))(q, k, v)


def make(T, H, J, dtype=jnp.float64, B=2, A=8):
    keys = jax.random.split(jax.random.key(T), 3)
    shapes = ((B, T, H, A), (B, T, J, A), (B, T, J, A))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def documents(T):
    """Segment ids: row 0 has three documents; row 1 has one, then padding."""
    first = np.repeat([1, 2, 3], [T // 3, T // 3, T - 2 * (T // 3)])
    second = np.where(np.arange(T) < T - 5, 1, 0)
    return jnp.asarray(np.stack([first, second]), jnp.int32)


# T = 7 is one chunk; 64 and 96 are two and three, with borders inside and between documents.
@pytest.mark.parametrize("T", [7, 64, 96])
@pytest.mark.parametrize(("H", "J"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("confined", [False, True])
def test_equals_the_loop(x64, mesh_of, T, H, J, confined):
    q, k, v = make(T, H, J)
    segments = documents(T)
    got = run(q, k, v, segments if confined else None, mesh_of())
    assert got.dtype == jnp.float64
    one_document = np.ones_like(segments)
    want = oracle(*map(np.asarray, (q, k, v)), np.asarray(segments) if confined else one_document)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)


def test_gradients_equal_finite_differences(x64, mesh_of):
    segments = documents(64)

    def function(q, k, v):
        return run(q, k, v, segments, mesh_of())

    check_grads(function, make(64, 4, 2, A=2), order=1, modes=["rev"])


def test_padding_is_finite_and_changes_nothing_real(mesh_of):
    q, k, v = make(64, 2, 2, jnp.float32)
    segments = documents(64)

    def scaled(scale):
        pad = jnp.where(segments == 0, scale, 1.0)[:, :, None, None]
        out = run(q * pad, k * pad, v * pad, segments, mesh_of())
        return np.asarray(out), np.asarray(segments) > 0

    plain, real = scaled(1.0)
    loud, _ = scaled(1e4)
    assert np.isfinite(loud).all()
    np.testing.assert_array_equal(plain[real], loud[real])


def test_large_scores_do_not_overflow(mesh_of):
    q, k, v = make(64, 2, 2, jnp.float32)
    out = run(q * 1e4, k * 1e4, v, None, mesh_of())
    assert np.isfinite(np.asarray(out)).all()
    assert np.abs(np.asarray(out)).max() <= np.abs(np.asarray(v)).max()


def test_bfloat16_keeps_a_float32_softmax(mesh_of):
    q, k, v = make(96, 4, 2, jnp.bfloat16)
    got = run(q, k, v, None, mesh_of())
    assert got.dtype == jnp.bfloat16
    wide = [np.asarray(x, np.float64) for x in (q, k, v)]
    want = oracle(*wide, np.ones(q.shape[:2]))
    assert np.abs(np.asarray(got, np.float64) - want).max() < 0.02


def test_same_on_a_mesh(x64, mesh_of):
    q, k, v = make(64, 4, 2)
    alone = run(q, k, v, documents(64), mesh_of())
    mesh = mesh_of(data=2, tensor=2)
    split = jax.NamedSharding(mesh, jax.P("data", None, "tensor", None))
    q, k, v = jax.device_put((q, k, v), split)
    together = run(q, k, v, documents(64), mesh)
    np.testing.assert_allclose(alone, together, rtol=1e-12)


def test_auto_is_the_reference_on_a_cpu(mesh_of):
    assert best_attention(mesh_of(), jnp.zeros((1, 128, 2, 8), jnp.bfloat16)) == "xla"


def outputs_and_gradients(name, q, k, v, segments, mesh):
    def loss(q, k, v):
        out = attention(q, k, v, segments, mesh, name)
        return (out**2).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return out, *gradients


@pytest.mark.parametrize("confined", [pytest.param(False, marks=pytest.mark.lifecycle), True])
def test_splash_equals_the_reference(mesh_of, confined):
    """Run the TPU kernel, forward and backward, in Pallas's TPU interpreter, with one row."""
    q, k, v = make(128, 2, 1, jnp.float32, B=1, A=128)
    segments = documents(128)[:1] if confined else None
    want = outputs_and_gradients("xla", q, k, v, segments, mesh_of())
    with pltpu.force_tpu_interpret_mode():
        got = outputs_and_gradients("splash", q, k, v, segments, mesh_of())
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("confined", [False, True])
def test_what_cudnn_is_asked_for_is_the_reference(x64, mesh_of, monkeypatch, confined):
    """The same call, computed by JAX's own formulation: mask, scale, order of axes, gradients."""
    plain = jax.nn.dot_product_attention

    def on_any_device(*operands, implementation, **how):
        assert implementation == "cudnn"
        return plain(*operands, implementation="xla", **how)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_any_device)
    q, k, v = make(64, 4, 2)
    segments = documents(64) if confined else None
    want = outputs_and_gradients("xla", q, k, v, segments, mesh_of())
    got = outputs_and_gradients("cudnn", q, k, v, segments, mesh_of())
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_deterministic_cudnn_gets_another_call_from_each_layer(mesh_of, monkeypatch):
    """The layers' scales differ but round to one float32; without the flag all are equal."""
    scales = []

    def note(q, *operands, scale, **how):
        scales.append(scale)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", note)
    for flags, different in (("", 1), ("--xla_gpu_deterministic_ops=true", 50)):
        monkeypatch.setenv("XLA_FLAGS", flags)
        scales.clear()
        for layer in [*range(50), *range(50)]:  # a second trace of a layer gives the same call
            attention(*make(8, 2, 2, jnp.bfloat16), None, mesh_of(), "cudnn", layer)
        assert len(set(scales)) == different and scales[:50] == scales[50:]
        assert {np.float32(scale) for scale in scales} == {np.float32(1 / np.sqrt(8))}


def test_an_unknown_name_is_refused(mesh_of):
    with pytest.raises(UserError, match="did you mean 'cudnn'"):
        attention(*make(8, 2, 2, jnp.float32), None, mesh_of(), "cuddn")
