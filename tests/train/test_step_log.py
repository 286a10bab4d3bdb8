"""What the trainer makes of steps that were left out."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from moe_jax.config import TrainConfig
from moe_jax.losses import LossValues
from moe_jax.train import step_log
from moe_jax.train.step import StepMetrics

ZERO = jnp.zeros(())


@pytest.fixture
def logged(monkeypatch):
    """(StepLog, rows, ledger rows, lines) of a run that bears two steps in a row."""
    clock = SimpleNamespace(stepped=lambda wait: None, read=lambda step: {})
    monkeypatch.setattr(step_log, "Clock", lambda run: clock)
    rows, ledger, lines = [], [], []
    reporter = SimpleNamespace(log=rows.append, ledger=ledger.append, say=lines.append)
    train = TrainConfig(steps=99, log_every=50, ledger_every=1, max_skipped=2)
    config = SimpleNamespace(train=train)
    run = SimpleNamespace(config=config, store=SimpleNamespace(sources=("a",)))
    return step_log.StepLog(run, reporter, 0), rows, ledger, lines


def take(log, step, skipped):
    loss = LossValues(*[ZERO] * 5)
    log.started(step, StepMetrics(loss, ZERO, ZERO, ZERO, jnp.asarray(skipped), None), 0.0)


def test_left_out_steps_count_nowhere_and_too_many_end_the_run(logged):
    log, rows, ledger, lines = logged
    for step, skipped in enumerate([False, True, True, False, True, True, True], 1):
        take(log, step, skipped)
        assert not log.diverged  # one step behind
    log.flush()
    assert [row["step"] for row in ledger] == [1, 4]
    assert [row["step"] for row in rows if row["skipped"]] == [2, 3, 5, 6, 7]
    assert [line.split(" is left out")[0] for line in lines] == [
        f"step {step}" for step in (2, 3, 5, 6)
    ]
    assert "step 7 diverged (the loss or gradient of 3 steps in a row" in log.diverged
    assert log.changed == 4


@pytest.mark.parametrize(
    ("saved", "begins", "ends"),
    [
        ([], "lower optimizer.learning_rate", "from the beginning"),
        ([2, 3], "lower optimizer.learning_rate", "from step 3"),
        ([2, 4, 6], "move 4, 6 out of", "from step 2"),  # 6 was left out: the parameters of 4
        ([4, 5, 6], "move 4, 5, 6 out of", "from the beginning"),
    ],
)
def test_the_way_on_leads_back_before_the_parameters_that_diverged(saved, begins, ends):
    advice = step_log.way_on(saved, changed=4)
    assert advice.startswith(begins) and advice.endswith(ends)
