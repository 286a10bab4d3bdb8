"""Operands of a grouped matmul, and the expected results by a loop over groups in NumPy.

Axes: N rows, D input width, F output width, E groups.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.ops.grouped_matmul import grouped_matmul


def arrays(sizes, N, D, F, dtype):
    """x, w and dy; padding rows of x and dy are NaN, which would show if they reached a result."""
    rng = np.random.default_rng(0)
    x_ND, dy_NF = rng.normal(size=(N, D)), rng.normal(size=(N, F))
    w_EDF = rng.normal(size=(len(sizes), D, F))
    x_ND[sum(sizes) :] = dy_NF[sum(sizes) :] = np.nan
    return tuple(a.astype(dtype) for a in (x_ND, w_EDF, dy_NF))


def loop(x_ND, w_EDF, dy_NF, sizes):
    """Compute (y, dx, dw) without padding rows, group by group in float64."""
    x_ND, w_EDF, dy_NF = (np.asarray(a, np.float64) for a in (x_ND, w_EDF, dy_NF))
    ends = np.cumsum(sizes)
    groups = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    y = np.concatenate([x_ND[rows] @ w for rows, w in zip(groups, w_EDF, strict=True)])
    dx = np.concatenate([dy_NF[rows] @ w.T for rows, w in zip(groups, w_EDF, strict=True)])
    return y, dx, np.stack([x_ND[rows].T @ dy_NF[rows] for rows in groups])


def close(found, expected):
    """True if the difference is within bfloat16's rounding of one result."""
    found = np.asarray(found, np.float64)
    np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-4)


def gradient_program(platform, N, D, F) -> str:
    """The StableHLO of both gradients of a grouped matmul in shard_map, lowered for a platform."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def local(x, w, sizes):
        y = grouped_matmul(x, jax.lax.pcast(w, ("data",), to="varying"), sizes)
        return jax.lax.psum((y.astype(jnp.float32) ** 2).sum(), "data")

    loss = jax.shard_map(local, mesh=mesh, in_specs=(data, whole, data), out_specs=whole)
    x, w = jnp.zeros((N, D), jnp.bfloat16), jnp.zeros((2, D, F), jnp.bfloat16)
    step = jax.jit(jax.grad(loss, (0, 1))).trace(x, w, jnp.array([100, 100], jnp.int32))
    return step.lower(lowering_platforms=(platform,)).as_text()
