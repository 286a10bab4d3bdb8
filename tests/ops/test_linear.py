"""The projection with its own backward pass against an einsum and its autodiff."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.ops.linear import linear


def test_equals_the_einsum(x64):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, 3, 5), (5, 4, 6), (2, 3, 4, 6))
    x, w, dy = (jax.random.normal(k, s, jnp.float64) for k, s in zip(keys, shapes, strict=True))
    y, pullback = jax.vjp(linear, x, w)
    want, theirs = jax.vjp(lambda x, w: jnp.einsum("btd,dhf->bthf", x, w), x, w)
    for ours, expected in zip((y, *pullback(dy)), (want, *theirs(dy)), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-13)
