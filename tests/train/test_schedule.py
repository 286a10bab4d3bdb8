"""Learning-rate schedules compared with their formulas; one program serves runs of any length."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import ONE_LAYER, small_config

from moe_jax.errors import UserError
from moe_jax.model.define import define
from moe_jax.parallel.mesh import MeshConfig, make_mesh
from moe_jax.run.context import make_optimizer, make_step_options, microbatch_of
from moe_jax.run.resolve import resolve
from moe_jax.train.optim import Optimizer, OptimizerConfig
from moe_jax.train.schedule import fall_of, make_schedule
from moe_jax.train.state import placed_state
from moe_jax.train.step import abstract_batch, jit_train_step

SCHEDULES = {
    # name -> {step from 0: fraction of the peak}, with 10 steps of warm-up in a run of 110
    "constant": {0: 0.1, 4: 0.5, 9: 1, 60: 1, 109: 1},
    "cosine": {
        0: 0.1,
        4: 0.5,
        9: 1,
        34: 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2,
        59: 0.55,
        109: 0.1,
        500: 0.1,
    },
    "wsd": {0: 0.1, 4: 0.5, 9: 1, 87: 1, 98: 0.55, 109: 0.1, 500: 0.1},
    "inverse_sqrt": {0: 0.1, 4: 0.5, 9: 1, 39: 0.5, 89: 1 / 3},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(x64, name):
    config = OptimizerConfig(learning_rate=0.02, schedule=name, warmup_steps=10, final_share=0.1)
    schedule = make_schedule(config, 110)
    for step, share in SCHEDULES[name].items():
        assert float(schedule(jnp.int32(step))) == pytest.approx(0.02 * share, rel=1e-12), step


def promised(config: OptimizerConfig, steps: int) -> bool:
    """True if a run of `steps` has a step for the peak and the steps of the decay after it."""
    decay = max(1, round(steps * config.decay_share))
    fall = {"cosine": int(config.final_share < 1), "wsd": decay}.get(config.schedule, 0)
    return config.warmup_steps + fall <= steps


@settings(max_examples=200)
@given(
    config=st.builds(
        OptimizerConfig,
        learning_rate=st.sampled_from([1e-3, 2.0]),
        schedule=st.sampled_from(sorted(SCHEDULES)),
        warmup_steps=st.integers(0, 30),
        decay_share=st.sampled_from([0.01, 0.2, 0.5, 1.0]),
        final_share=st.sampled_from([0.0, 0.1, 1.0]),
    ),
    steps=st.integers(1, 30),
)
def test_a_schedule_keeps_its_promises_or_is_refused(config, steps):
    """For any length: a linear rise to the peak, no rise after it, then the final share."""
    if not promised(config, steps):
        with pytest.raises(UserError, match=r"train\.steps"):
            make_schedule(config, steps)
        return
    rates = np.asarray(make_schedule(config, steps)(jnp.arange(30)), np.float64)[:steps]
    shares, warmup = rates / config.learning_rate, config.warmup_steps
    np.testing.assert_allclose(shares[:warmup], np.arange(1, warmup + 1) / max(1, warmup), 1e-6)
    rest = shares[max(0, warmup - 1) :]
    assert (np.diff(rest) <= 1e-6).all() and (shares <= 1 + 1e-6).all()
    assert warmup or steps == 1 or rest[0] == pytest.approx(1)
    if config.schedule in ("cosine", "wsd"):
        assert shares[-1] == pytest.approx(config.final_share, abs=1e-6)
    assert shares[0] > 0 or steps == 1


def test_a_run_that_goes_on_to_more_steps_has_their_rates():
    """Step 10 of 10 had the final share; with 20 steps the rate then follows their schedule."""
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, final_share=0.2)
    before, after = (make_schedule(config, steps) for steps in (10, 20))
    assert float(before(9)) == pytest.approx(0.2)
    assert float(after(10)) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * 10 / 19)) / 2)
    assert float(after(19)) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"warmup_steps": 11}, "warmup_steps is 11, more than train.steps .10.*Set it below 10"),
        ({"warmup_steps": 10}, "no step is left for the decay to .*final_share. Set it below 10"),
        ({"warmup_steps": 11, "schedule": "constant"}, "would not reach its peak"),
        ({"warmup_steps": 11, "schedule": "inverse_sqrt"}, "would not reach its peak"),
        ({"warmup_steps": 9, "schedule": "wsd"}, r"decay_share \(0.2, 2 steps\) are more than"),
        ({"warmup_steps": 1, "schedule": "wsd", "decay_share": 1.0}, "are more than train.steps"),
    ],
)
def test_runs_too_short_for_their_schedule(change, sentence):
    with pytest.raises(UserError, match=sentence):
        Optimizer(OptimizerConfig(**change), 10)


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_the_train_step_of_a_longer_run_is_the_same_program(name):
    """A run resumed with more steps therefore finds the program in the compile cache."""
    config = small_config("", **ONE_LAYER | {"optimizer.schedule": name})
    config, components, _ = resolve(config, 1, 258)
    model, mesh = (
        define(config.model, jnp.float32, components),
        make_mesh(MeshConfig(), jax.devices()[:1]),
    )
    texts = set()
    for steps in (10, 20):
        train = dataclasses.replace(config.train, steps=steps)
        optimizer = make_optimizer(dataclasses.replace(config, train=train), model)
        step = jit_train_step(model, optimizer, make_step_options(config), mesh)
        state, batch = (
            placed_state(model, optimizer, mesh),
            abstract_batch(microbatch_of(config), mesh),
        )
        texts.add(step.lower(state, batch).as_text())
    assert len(texts) == 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_rate_is_that_of_the_length_it_is_given(name):
    config = OptimizerConfig(schedule=name, warmup_steps=3)
    steps = jnp.arange(137)
    of_any, own = make_schedule(config, 10), make_schedule(config, 137)
    np.testing.assert_allclose(of_any(steps, fall_of(config, 137)), own(steps), rtol=1e-6)
