"""Dispatch and combine by gathers against equal one-hot products, with their gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_interpreter import INTERPRETED, interpreted
from jax.sharding import PartitionSpec

from moe_jax.moe.dispatch.moves import (
    DispatchIndices,
    _gathered_in_pairs,
    _on_nvidia,
    _spread,
    _take_rows,
    combine,
    gather_tokens,
    gather_weights,
    sort_by_expert,
)
from moe_jax.ops.mosaic import choose

N, M, D, K = 10, 24, 3, 2

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def moves() -> DispatchIndices:
    """Random buffer rows for most assignments; some are dropped, and some rows are padding."""
    rng = np.random.default_rng(0)
    place_NK = rng.permutation(M)[: N * K].reshape(N, K)
    place_NK[rng.random((N, K)) < 0.3] = M
    place_NK[4] = M  # a token whose assignments are all dropped
    assignment_M = np.full(M, N * K)
    for number, place in enumerate(place_NK.reshape(-1)):
        if place < M:
            assignment_M[place] = number
    arrays = (jnp.asarray(a, jnp.int32) for a in (assignment_M // K, assignment_M, place_NK))
    return DispatchIndices(*arrays, zero_fill=True)


@pytest.fixture
def one_hot(moves):
    return (np.asarray(moves.place_NK)[..., None] == np.arange(M)).astype(np.float64)


def test_the_fixture_has_every_kind(moves):
    kept = np.asarray(moves.place_NK) < M
    assert not kept.all() and kept.any(1).sum() < N and (np.asarray(moves.token_M) == N).any()


def same_gradients(ours, plain, args):
    """Assert equal values, and equal gradients for one random cotangent."""
    y, pullback = jax.vjp(ours, *args)
    expected, expected_pullback = jax.vjp(plain, *args)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-14)
    cotangent = jax.random.normal(jax.random.key(5), y.shape, y.dtype)
    for found, wanted in zip(pullback(cotangent), expected_pullback(cotangent), strict=True):
        assert np.asarray(wanted).any()
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-14)


def test_gather_tokens(moves, one_hot):
    x_ND = jax.random.normal(jax.random.key(0), (N, D), jnp.float64)
    same_gradients(
        lambda x: gather_tokens(x, moves),
        lambda x: jnp.einsum("nkm,nd->md", one_hot, x),
        (x_ND,),
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rows_moved_in_pairs_are_the_rows(moves, dtype):
    """The gather that GPUs run equals the plain gather bit for bit."""
    bits = jax.random.bits(jax.random.key(3), (N, 6), jnp.uint16)
    x_ND = jax.lax.bitcast_convert_type(bits, jnp.dtype(dtype))  # some are NaN or infinity
    operands = x_ND, moves.token_M, moves.place_NK
    found, expected = _gathered_in_pairs(*operands), _take_rows(*operands)
    for rows in (found, expected):
        assert rows.dtype == x_ND.dtype and rows.shape == (M, 6)
    same = (jax.lax.bitcast_convert_type(rows, jnp.uint16) for rows in (found, expected))
    np.testing.assert_array_equal(*same)


@pytest.mark.parametrize("columns", [128, 384, 2 * 1024])  # one chunk and several
def test_spread_rows_are_the_gathered_ones(moves, columns):
    """Bit for bit, except in padding rows: they stay NaN, with which the interpreter starts."""
    x_ND = jax.random.normal(jax.random.key(4), (N, columns), jnp.bfloat16)
    operands = x_ND, moves.token_M, moves.place_NK
    found_MD = np.asarray(interpreted(_spread, _take_rows, *operands), np.float32)
    filled_M = np.asarray(moves.token_M) < N
    expected_MD = np.asarray(_take_rows(*operands), np.float32)
    np.testing.assert_array_equal(found_MD[filled_M], expected_MD[filled_M])
    if INTERPRETED:
        assert np.isnan(found_MD[~filled_M]).all()


@pytest.mark.parametrize(
    ("zero_fill", "dtype", "columns", "chosen"),
    [
        (False, jnp.bfloat16, 256, _spread),
        (True, jnp.bfloat16, 256, _gathered_in_pairs),  # batched experts multiply empty slots too
        (False, jnp.bfloat16, 64, _gathered_in_pairs),
        (False, jnp.bfloat16, 63, _take_rows),
        (False, jnp.float32, 256, _take_rows),
    ],
)
def test_what_nvidia_gpus_run(monkeypatch, zero_fill, dtype, columns, chosen):
    x_ND = jnp.zeros((N, columns), dtype)
    assert _on_nvidia(x_ND, zero_fill) is not _spread, "chosen without a GPU"
    monkeypatch.setattr(choose, "runs_here", lambda: True)
    assert _on_nvidia(x_ND, zero_fill) is chosen


def test_a_gpu_spreads_inside_shard_map(monkeypatch, mesh_of, moves):
    """Dispatch and the gradient of combine use the kernel; a program for a CPU does not."""
    new = jax.__version_info__ >= choose.FIRST_JAX
    monkeypatch.setattr(choose, "runs_here", lambda: new)
    everywhere = PartitionSpec()
    unread = dataclasses.replace(moves, zero_fill=False)

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh_of(data=2), in_specs=PartitionSpec("data"), out_specs=everywhere
    )
    def there_and_back(x_ND):
        def summed(x_ND):
            return combine(gather_tokens(x_ND, unread), unread).sum(dtype=jnp.float32)

        return jax.lax.psum(jax.grad(summed)(x_ND).sum(), "data")

    traced = there_and_back.trace(jnp.zeros((2 * N, 256), jnp.bfloat16))
    programs = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cuda", "cpu")}
    assert programs["cuda"].count("mosaic_gpu") >= 2 * new and "mosaic_gpu" not in programs["cpu"]


def test_combine(moves, one_hot):
    y_MD = jax.random.normal(jax.random.key(1), (M, D), jnp.float64)
    same_gradients(
        lambda y: combine(y, moves),
        lambda y: jnp.einsum("nkm,md->nd", one_hot, y),
        (y_MD,),
    )


def test_gather_weights(moves, one_hot):
    weights_NK = jax.random.normal(jax.random.key(2), (N, K), jnp.float64)
    same_gradients(
        lambda w: gather_weights(w, moves),
        lambda w: jnp.einsum("nkm,nk->m", one_hot, w),
        (weights_NK,),
    )


@pytest.mark.parametrize("experts", [5, 2**28])  # the second does not fit the packed key
def test_sort_by_expert_is_stable_with_nobody_last(experts):
    ids = np.random.default_rng(1).integers(0, 5, (3, 20)).astype(np.int32)
    ids[ids == 4] = experts
    expected = np.argsort(ids, axis=1, kind="stable")
    np.testing.assert_array_equal(sort_by_expert(jnp.asarray(ids), experts), expected)
