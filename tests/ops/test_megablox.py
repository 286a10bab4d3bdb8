"""The TPU kernels in Pallas's TPU interpreter, on a CPU, against a loop over groups in NumPy.

The interpreter fills unwritten memory with NaN.
"""

import jax.numpy as jnp
import ml_dtypes
import pytest
from grouped_cases import arrays, close, gradient_program, loop
from jax.experimental.pallas import tpu as pltpu

from moe_jax.ops import megablox
from moe_jax.ops.grouped_matmul import IMPLEMENTATIONS

N, D, F = 256, 128, 256
SIZES = {
    "whole_tiles": [128, 0, 128],
    "off_every_border": [37, 150, 69],
    "rows_past_the_end": [3, 0, 141],
    "empty_at_both_ends": [0, 256, 0],
    "nothing": [0, 0, 0],
}


@pytest.mark.parametrize("case", SIZES)
def test_the_products_against_a_loop(case):
    sizes = SIZES[case]
    sizes_E, owned = jnp.array(sizes, jnp.int32), sum(sizes)
    x, w, dy = (jnp.asarray(a) for a in arrays(sizes, N, D, F, ml_dtypes.bfloat16))
    y, dx, dw = loop(x, w, dy, sizes)
    products = IMPLEMENTATIONS["megablox"]
    with pltpu.force_tpu_interpret_mode():
        close(products.forward(x, w, sizes_E)[:owned], y)
        close(products.input_gradient(dy, w, sizes_E)[:owned], dx)
        close(products.weight_gradient(x, dy, sizes_E), dw)


@pytest.mark.parametrize(
    ("sizes", "tiles"),
    [
        ((32768, 8, 4096, 14336), (512, 1024, 1024)),
        ((131072, 1024, 2048, 1024), (128, 1024, 1024)),
        ((384, 1, 640, 256), (128, 128, 256)),
        ((128, 8, 128, 128), (128, 128, 128)),
    ],
)
def test_tiles_divide_what_they_cut(sizes, tiles):
    """`sizes` are rows, groups, depth and columns; small groups get small row tiles."""
    assert megablox.tiling(*sizes) == tiles


@pytest.mark.parametrize(
    ("rows", "d", "f", "dtype", "chosen"),
    [
        (1024, 256, 512, jnp.bfloat16, True),
        (1024, 256, 512, jnp.float32, False),
        (1032, 256, 512, jnp.bfloat16, False),
        (0, 256, 512, jnp.bfloat16, False),
        (1024, 192, 512, jnp.bfloat16, False),
        (1024, 256, 192, jnp.bfloat16, False),
    ],
)
def test_what_the_kernels_take(monkeypatch, rows, d, f, dtype, chosen):
    x, w = jnp.zeros((rows, d), dtype), jnp.zeros((2, d, f), dtype)
    assert not megablox.supports(x, w), "chosen without a TPU"
    monkeypatch.setattr(megablox, "runs_here", lambda: True)
    assert megablox.supports(x, w) is chosen


@pytest.mark.parametrize(("width", "kernels"), [(256, 3), (192, 0)])
def test_a_program_for_a_tpu_holds_the_kernels_inside_shard_map(monkeypatch, width, kernels):
    """Lowered for TPUs on this machine; an unsupported width uses the fallback."""
    monkeypatch.setattr(megablox, "runs_here", lambda: True)
    text = gradient_program("tpu", N, D, width)
    assert text.count("stablehlo.custom_call @tpu_custom_call") == kernels
    assert ("ragged_dot" in text) is (kernels == 0)
