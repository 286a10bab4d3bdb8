"""The Hopper kernels in the interpreter, on a CPU, against a loop over groups in NumPy.

The interpreter runs a block's warpgroups, barriers and copies; with most wrong orders of waits it
hangs or reports an error.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gpu_interpreter import interpreted
from grouped_cases import arrays, close, gradient_program, loop

from moe_jax.ops.grouped_matmul import IMPLEMENTATIONS
from moe_jax.ops.mosaic import choose
from moe_jax.ops.mosaic.product import row_tiles
from moe_jax.ops.mosaic.ring import share
from moe_jax.ops.mosaic.weight_gradient import longest_first

N, D, F = 256, 128, 256

SIZES = {
    "whole_tiles": [128, 0, 128],
    "off_every_border": [37, 150, 69],
    "rows_past_the_end": [3, 0, 141],
    "nothing": [0, 0, 0],
}


@pytest.fixture(params=[1, 2])
def three_blocks(request, monkeypatch):
    """Fewer blocks than units of work, so that every block loops over several, in 1 or 2 waves."""
    monkeypatch.setattr("moe_jax.ops.mosaic.ring.multiprocessors", lambda: 3)
    monkeypatch.setattr("moe_jax.ops.mosaic.ring.count_waves", lambda units: request.param)


def run_product(name, *operands):
    """Run a product of the kernels in the interpreter."""
    ours, other = (getattr(IMPLEMENTATIONS[which], name) for which in ("mosaic", "ragged"))
    return interpreted(ours, other, *operands)


@pytest.mark.parametrize("case", SIZES)
def test_the_products_against_a_loop(case, three_blocks):
    sizes = SIZES[case]
    sizes_E, owned = jnp.array(sizes, jnp.int32), sum(sizes)
    x, w, dy = (jnp.asarray(a) for a in arrays(sizes, N, D, F, ml_dtypes.bfloat16))
    y, dx, dw = loop(x, w, dy, sizes)
    close(run_product("forward", x, w, sizes_E)[:owned], y)
    close(run_product("input_gradient", dy, w, sizes_E)[:owned], dx)
    close(run_product("weight_gradient", x, dy, sizes_E), dw)


@pytest.mark.parametrize("width", [128, 384])
def test_narrow_outputs(width, three_blocks):
    """Numbers of columns that the wide tile does not divide."""
    x, w, dy = (jnp.asarray(a) for a in arrays([130, 126], N, D, F, ml_dtypes.bfloat16))
    w, dy = jnp.concatenate([w, w], 2)[:, :, :width], jnp.concatenate([dy, dy], 1)[:, :width]
    y, _, dw = loop(x, w, dy, [130, 126])
    sizes_E = jnp.array([130, 126], jnp.int32)
    close(run_product("forward", x, w, sizes_E), y)
    close(run_product("weight_gradient", x, dy, sizes_E), dw)


@pytest.mark.parametrize("waves", [1, 3, 8])
@pytest.mark.parametrize("total", [0, 1, 4, 5, 16, 67])
def test_every_unit_has_one_block(waves, total):
    taken = []
    for block in range(4 * waves):
        unit, count = share(jnp.int32(block), 4, waves, jnp.int32(total))
        taken += [int(unit(i)) for i in range(int(count))]
    assert sorted(taken) == list(range(total))


def test_waves_follow_the_devices_and_the_work(monkeypatch):
    monkeypatch.setattr(choose, "multiprocessors", lambda: 10)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert choose.count_waves(10**6) == 1
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    found = [choose.count_waves(units) for units in (0, 119, 240, 10**6)]
    assert found == [1, 1, 2, choose.MAX_WAVES]


def test_every_row_is_stored_once():
    """For random sizes, tiles store each group's rows exactly once, with that group's number."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = rng.multinomial(900, rng.dirichlet(np.full(6, 0.3)))
        table, count = row_tiles(jnp.array(sizes), 1000, 128)
        group = np.full(1000, -1)
        for e, row, begin, end in np.asarray(table).T[: int(count[0])]:
            assert row % choose.ALIGN == 0 and row <= begin < end <= row + 128
            assert (group[begin:end] == -1).all()
            group[begin:end] = e
        np.testing.assert_array_equal(group, np.repeat([*range(6), -1], [*sizes, 100]))


def test_long_groups_come_first():
    steps = jnp.array([2, 5, 0, 5, 1])
    table = jnp.stack([jnp.arange(5), steps])
    np.testing.assert_array_equal(longest_first(table, steps), [[1, 3, 0, 4, 2], [5, 5, 2, 1, 0]])


@pytest.mark.parametrize(
    ("rows", "d", "f", "dtype", "chosen"),
    [
        (1024, 256, 512, jnp.bfloat16, True),
        (1024, 256, 512, jnp.float32, False),
        (1020, 256, 512, jnp.bfloat16, False),
        (64, 256, 512, jnp.bfloat16, False),
        (1024, 192, 512, jnp.bfloat16, False),
        (1024, 256, 192, jnp.bfloat16, False),
    ],
)
def test_what_the_kernels_take(monkeypatch, rows, d, f, dtype, chosen):
    x, w = jnp.zeros((rows, d), dtype), jnp.zeros((2, d, f), dtype)
    assert not choose.supports(x, w), "chosen without a GPU"
    monkeypatch.setattr(choose, "runs_here", lambda: True)
    assert choose.supports(x, w) is chosen


def test_a_program_for_a_gpu_holds_the_kernels_inside_shard_map(monkeypatch):
    """Lowered for CUDA on this machine: three kernels, no ragged_dot, and varying axes agree."""
    monkeypatch.setattr(choose, "runs_here", lambda: True)
    text = gradient_program("cuda", N, D, F)
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 3
    assert "ragged_dot" not in text
