"""Tiled and ragged grouped matmuls, forward and backward, against a loop over groups in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped_cases import arrays, loop

from moe_jax.ops.grouped_matmul import (
    grouped_matmul,
    ragged_weight_gradient,
    reference,
    tile_rows,
    tiled_forward,
    tiled_weight_gradient,
)

N, D, F = 96, 6, 5

# Rows of each group.  The mean of 16 makes tiles of 16 rows.
SIZES = {
    "even": [16] * 6,
    "empty_groups": [0, 40, 0, 0, 56, 0],
    "skewed": [71, 13, 1, 0, 3, 8],
    "one_group": [0, 0, 0, 96, 0, 0],
    "off_tile_borders": [13, 17, 9, 31, 7, 19],
    "rows_past_the_end": [13, 0, 20, 5, 1, 9],
    "nothing": [0] * 6,
}
FORWARD = {"tiled": tiled_forward, "ragged": jax.lax.ragged_dot, "reference": reference}
WEIGHT_GRADIENT = {"tiled": tiled_weight_gradient, "ragged": ragged_weight_gradient}
TOLERANCE = {"float64": 1e-13, "float32": 2e-6}


def close(found, expected, dtype):
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[dtype] * 20)


@pytest.fixture(params=["float64", "float32"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.mark.parametrize("path", FORWARD)
def test_forward(path, dtype):
    multiply = jax.jit(FORWARD[path])
    for sizes in SIZES.values():
        x, w, dy = arrays(sizes, N, D, F, dtype)
        if path == "reference":  # it masks by multiplying, and 0 * NaN is NaN
            x = np.nan_to_num(x)
        y = multiply(x, w, np.array(sizes, np.int32))
        close(y[: sum(sizes)], loop(x, w, dy, sizes)[0], dtype)


@pytest.mark.parametrize("path", WEIGHT_GRADIENT)
def test_weight_gradient(path, dtype):
    gradient = jax.jit(WEIGHT_GRADIENT[path])
    for name, sizes in SIZES.items():
        x, w, dy = arrays(sizes, N, D, F, dtype)
        dw = np.asarray(gradient(x, dy, np.array(sizes, np.int32)))
        close(dw, loop(x, w, dy, sizes)[2], dtype)
        assert not dw[np.array(sizes) == 0].any(), name


def test_gradients_of_the_whole_operation(dtype):
    """Through the custom VJP, with NaN in the padding rows."""

    @jax.jit
    def run(x, w, dy, sizes):
        y, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
        return y, *pullback(dy)

    for sizes in SIZES.values():
        x, w, dy = arrays(sizes, N, D, F, dtype)
        y, dx, dw = run(x, w, dy, np.array(sizes, np.int32))
        expected = loop(x, w, dy, sizes)
        close(y[: sum(sizes)], expected[0], dtype)
        close(dx[: sum(sizes)], expected[1], dtype)
        close(dw, expected[2], dtype)


def test_gradients_are_those_of_the_reference(x64):
    """The custom VJP also agrees with a second oracle: autodiff of the masked reference."""
    sizes = jnp.array(SIZES["rows_past_the_end"], jnp.int32)
    x, w, dy = (jnp.nan_to_num(a) for a in arrays(SIZES["rows_past_the_end"], N, D, F, "float64"))
    _, ours = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
    _, theirs = jax.vjp(lambda x, w: reference(x, w, sizes), x, w)
    for found, expected in zip(ours(dy), theirs(dy), strict=True):
        owned = slice(None) if found.ndim == 3 else slice(int(sizes.sum()))
        np.testing.assert_allclose(found[owned], expected[owned], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("rows", "groups", "tile"), [(96, 6, 16), (97, 12, 8), (1, 8, 8), (10**6, 8, 256)]
)
def test_tiles_follow_the_mean_group(rows, groups, tile):
    assert tile_rows(rows, groups) == tile
