"""RMSNorm, RoPE, q/k norm and the dense FFN compared with NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.model.attention import Attention, AttentionConfig
from moe_jax.model.config import ModelConfig
from moe_jax.model.rope import apply_rope, rope_tables
from moe_jax.model.transformer import Transformer
from moe_jax.nn.ffn import DenseFFN
from moe_jax.nn.norms import rms_norm
from moe_jax.nn.params import fan_in, param, scoped

CONFIG = ModelConfig(width=24, num_heads=4, num_kv_heads=2, head_dim=6, ffn_width=10)


def normal(shape, dtype=jnp.float64, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def test_rms_norm(x64):
    x, weight = normal((2, 3, 8)), normal((8,), seed=1)
    wide = np.asarray(x)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(weight)
    np.testing.assert_allclose(rms_norm(x, weight, 1e-5), want, rtol=1e-13)


def test_rms_norm_rounds_before_the_weight():
    """Statistics in float32, then a cast to bfloat16, then the weight, as in Hugging Face."""
    x, weight = normal((4, 64), jnp.bfloat16), normal((64,), jnp.float32, 1)
    wide = np.asarray(x, np.float32)
    unit = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    want = jnp.asarray(unit, jnp.bfloat16) * weight.astype(jnp.bfloat16)
    np.testing.assert_array_equal(rms_norm(x, weight, 1e-5), want)


def test_rope(x64):
    x, theta = normal((2, 5, 3, 8)), 100.0
    positions = jnp.asarray([[0, 1, 2, 3, 4], [7, 0, 1, 100, 5]], jnp.int32)
    got = apply_rope(x, rope_tables(positions, 8, theta, jnp.float64))
    want = np.zeros(x.shape)
    for b, t, h, i in np.ndindex(2, 5, 3, 4):
        turn = np.exp(1j * float(positions[b, t]) * theta ** (-2 * i / 8))
        z = complex(x[b, t, h, i], x[b, t, h, i + 4]) * turn
        want[b, t, h, i], want[b, t, h, i + 4] = z.real, z.imag
    np.testing.assert_allclose(got, want, atol=1e-13)


def test_rope_angles_are_float32_for_bfloat16():
    positions = jnp.asarray([[4095]], jnp.int32)
    rope = rope_tables(positions, 8, 1e4, jnp.bfloat16)
    assert rope.cos_BTP.dtype == jnp.float32
    np.testing.assert_allclose(rope.cos_BTP[0, 0, 0], np.cos(4095.0), atol=1e-5)
    assert apply_rope(normal((1, 1, 2, 8), jnp.bfloat16), rope).dtype == jnp.bfloat16


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_dense_ffn(x64, activation):
    ffn = DenseFFN(24, 10, activation=activation, depth=4, dtype=jnp.float64, rngs=nnx.Rngs(0))
    x = normal((2, 3, 24))
    up = np.asarray(x) @ np.asarray(ffn.w_in_DF[...])
    if ffn.w_gate_DF is None:
        cubic = np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)
        hidden = 0.5 * up * (1 + np.tanh(cubic))
    else:
        gate = np.asarray(x) @ np.asarray(ffn.w_gate_DF[...])
        hidden = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(ffn(x), hidden @ np.asarray(ffn.w_out_FD[...]), atol=1e-13)
    assert (ffn.w_gate_DF is None) == (activation == "gelu")


@pytest.mark.parametrize(("qk_norm", "sizes"), [("head", (6, 6)), ("full", (24, 12))])
def test_qk_norm_makes_attention_blind_to_scale(x64, mesh_of, qk_norm, sizes):
    """Scaling the weights of q and k changes the output only if q and k are not normalised."""
    x = normal((1, 5, 24))
    rope = rope_tables(jnp.arange(5, dtype=jnp.int32)[None], 6, 1e4, jnp.float64)

    def spread(qk_norm, scale_one_head):
        config = AttentionConfig(24, 4, 2, 6, qk_norm=qk_norm, norm_eps=0.0, depth=4)
        layer = Attention(config, layer=0, dtype=jnp.float64, rngs=nnx.Rngs(0))
        plain = layer(x, rope, None, mesh_of())
        scale = jnp.ones(4).at[0].set(3.0) if scale_one_head else jnp.full(4, 3.0)
        layer.q_DHA[...] = layer.q_DHA[...] * scale[:, None]
        if layer.q_norm is not None and layer.k_norm is not None:
            assert (layer.q_norm.weight.shape[0], layer.k_norm.weight.shape[0]) == sizes
        return float(jnp.abs(layer(x, rope, None, mesh_of()) - plain).max())

    assert spread(qk_norm, scale_one_head=False) < 1e-12
    assert spread("none", scale_one_head=False) > 1e-3
    # Scaling one head changes nothing with a norm per head, but does with a norm over all heads.
    assert (spread(qk_norm, scale_one_head=True) < 1e-12) == (qk_norm == "head")


def test_a_parameter_depends_on_its_name_alone():
    def value(name, *drawn_before):
        rngs = nnx.Rngs(7)
        for other in drawn_before:
            param(rngs, other, (4,), (None,), fan_in(4), jnp.float32, group="ffn")
        return np.asarray(
            param(rngs, name, (4,), (None,), fan_in(4), jnp.float32, group="ffn")[...]
        )

    np.testing.assert_array_equal(value("q"), value("q", "k", "v"))
    assert (value("q") != value("k")).all()
    keys = [scoped(nnx.Rngs(7), name).params.key.get_value() for name in ("a", "b", 0, 1)]
    assert len({bytes(np.asarray(jax.random.key_data(key))) for key in keys}) == 4


def test_fan_in_has_the_variance_it_promises():
    sample = fan_in(64)(jax.random.key(0), (200, 200), jnp.float32)
    assert abs(float(sample.std()) - 1 / 8) < 1e-3
    assert float(jnp.abs(sample).max()) <= 2 / 8 / 0.8796


def test_axes_must_name_every_dimension():
    with pytest.raises(ValueError, match="logical axes"):
        param(nnx.Rngs(0), "w", (2, 3), ("embed",), fan_in(2), jnp.float32, group="ffn")


def test_a_parameter_names_a_group_that_exists():
    with pytest.raises(ValueError, match="'expert' is not one of"):
        param(nnx.Rngs(0), "w", (2,), (None,), fan_in(2), jnp.float32, group="expert")


def test_the_embedding_adds_a_tokens_gradients_in_float32():
    """4096 occurrences of one token: in bfloat16 the sum of gradients would stop growing at 256."""
    config = ModelConfig(vocab_size=8, num_layers=1, width=16, dense=True)
    graph, params = nnx.split(Transformer(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(params=0)))
    tokens_BT = jnp.zeros((4, 1024), jnp.int32)

    def total(params):
        return nnx.merge(graph, params).embed(tokens_BT).astype(jnp.float32).sum()

    gradient_VD = jax.grad(total)(params)["embed_VD"][...]
    np.testing.assert_array_equal(gradient_VD[0], 4096)
