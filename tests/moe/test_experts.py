"""The experts' initial std is that of one expert's fan-in, for any number of experts."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.moe.config import MoEConfig
from moe_jax.moe.layer import MoE

D, F = 64, 96


def weights(experts: int, num_layers: int = 2):
    config = MoEConfig(num_experts=experts, top_k=1, router="switch", expert_width=F)
    layer = MoE(config, D, depth=num_layers, dtype=jnp.float32, rngs=nnx.Rngs(params=0))
    return np.asarray(layer.w_in_EDUF[...]), np.asarray(layer.w_out_EFD[...])


@pytest.mark.parametrize("experts", [1, 4, 16])
def test_std_is_the_fan_in_of_one_expert(experts):
    """A stack initialised as one [E, D, F] tensor would be too small by a factor of sqrt(E)."""
    w_in_EDUF, w_out_EFD = weights(experts, num_layers=3)
    for e in range(experts):
        assert w_in_EDUF[e].std() == pytest.approx(1 / np.sqrt(D), rel=0.05)
        assert w_out_EFD[e].std() == pytest.approx(1 / np.sqrt(F * 2 * 3), rel=0.05)


def test_experts_differ_and_are_uncorrelated():
    w_in_EDUF, _ = weights(8)
    correlation = np.corrcoef(w_in_EDUF.reshape(8, -1))
    assert np.abs(correlation - np.eye(8)).max() < 0.05
