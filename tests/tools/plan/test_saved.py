"""A saved executable equals the compiled one, and any other file is refused."""

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from moe_jax.config import Config
from moe_jax.data.batch import make_batch
from moe_jax.errors import UserError
from moe_jax.model.config import ModelConfig
from moe_jax.moe.config import MoEConfig
from moe_jax.parallel.mesh import MeshConfig, make_mesh
from moe_jax.tools.plan.lowering import lower, make_plan
from moe_jax.tools.plan.saved import load_step, save_step
from moe_jax.train.state import init_train_state

MODEL = ModelConfig(
    vocab_size=64, num_layers=1, width=32, head_dim=8, moe=MoEConfig(num_experts=2, expert_width=32)
)


@pytest.fixture
def no_cache():
    """XLA's CPU backend cannot save a program that it loaded from the compilation cache."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()


def test_a_saved_step_runs_as_the_compiled_one(tmp_path, no_cache):
    config = Config(mesh=MeshConfig(expert=2), model=MODEL)
    devices = jax.devices()[:2]
    plan = make_plan(config, 2)
    compiled = lower(plan, devices).compile()
    path = str(tmp_path / "step")
    digest = save_step(compiled, path)
    loaded = load_step(path, digest, plan, devices)

    mesh = make_mesh(plan.config.mesh, devices)
    first, second = (
        init_train_state(plan.model, plan.optimizer, mesh, jax.random.key(0)) for _ in range(2)
    )
    shape = (1, config.train.batch_size, config.data.sequence_length)
    tokens = np.random.default_rng(0).integers(0, 64, shape, np.int32)
    batch = make_batch(tokens, tokens)
    state, expected = compiled(first, batch)
    again, metrics = loaded(second, batch)
    assert float(metrics.loss.total) == float(expected.loss.total)
    jax.tree.map(np.testing.assert_array_equal, again.params, state.params)

    with open(path, "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="it is not the saved file"):
        load_step(path, digest, plan, devices)
