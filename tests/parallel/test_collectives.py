"""The all-to-all of experts' rows, against JAX's tiled all-to-all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax.parallel.collectives import from_experts, to_experts


@pytest.mark.parametrize("experts", [4, 12])
def test_there_and_back(mesh_of, experts):
    """One or several experts per device: rows as in the tiled form, restored by the inverse."""
    x = jnp.arange(4 * experts * 3 * 2.0).reshape(4 * experts, 3, 2)

    def run(function):
        mesh = mesh_of(expert=4)
        return jax.jit(
            jax.shard_map(function, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
        )(x)

    def tiled(x_EMD):
        return jax.lax.all_to_all(x_EMD, "expert", split_axis=0, concat_axis=1, tiled=True)

    there = run(lambda x: to_experts(x, "expert", 4))
    np.testing.assert_array_equal(there, run(tiled))
    assert not np.array_equal(there.reshape(-1), x.reshape(-1))
    back = run(lambda x: from_experts(to_experts(x, "expert", 4), "expert", 4))
    np.testing.assert_array_equal(back, x)
