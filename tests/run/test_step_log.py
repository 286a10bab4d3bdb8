"""What the trainer logs and counts when steps are skipped."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from moe_jax.run import step_log
from moe_jax.sections import TrainConfig
from moe_jax.train.guard import first_guard
from moe_jax.train.losses import LossValues
from moe_jax.train.step import StepMetrics

ZERO = jnp.zeros(())


@pytest.fixture
def logged(monkeypatch):
    """(StepLog, rows, ledger, lines, flight records) of a run with train.max_skipped 2."""
    clock = SimpleNamespace(stepped=lambda wait: None, read=lambda step: {})
    monkeypatch.setattr(step_log, "Clock", lambda run: clock)
    rows, ledger, lines, records = [], [], [], []
    reporter = SimpleNamespace(log=rows.append, ledger=ledger.append, say=lines.append)
    train = TrainConfig(steps=99, log_every=50, ledger_every=1, max_skipped=2)
    config = SimpleNamespace(train=train)
    run = SimpleNamespace(
        config=config,
        model=SimpleNamespace(components=None),
        store=SimpleNamespace(sources=("a",), streams=("a", "b")),
        batches=SimpleNamespace(epochs=lambda steps: [steps / 4, steps / 8]),
    )
    flight = SimpleNamespace(
        saw=lambda step, metrics: None, write=lambda why, last: records.append(why)
    )
    return step_log.StepLog(run, reporter, flight, 0, 0, 99), rows, ledger, lines, records


def take(log, step, skipped, spike=False):
    loss, guard = LossValues(*[ZERO] * 5), first_guard(jnp.float32)
    refused, far = jnp.asarray(skipped), jnp.asarray(spike)
    log.launched(step, StepMetrics(loss, ZERO, ZERO, ZERO, refused, far, guard, None), 0.0)


def test_left_out_steps_count_nowhere_and_too_many_end_the_run(logged):
    log, rows, ledger, lines, records = logged
    for step, skipped in enumerate([False, True, True, False, True, True, True], 1):
        take(log, step, skipped)
        assert not log.divergence  # one step behind
    log.flush()
    assert [row["step"] for row in ledger] == [1, 4]
    assert [row["step"] for row in rows if row["skipped"]] == [2, 3, 5, 6, 7]
    why = "loss or gradient norm is not finite"
    assert lines == [
        f"step {step} skipped: {why} ({in_a_row} in a row, train.max_skipped 2)"
        for step, in_a_row in ((2, 1), (3, 2), (5, 1), (6, 2))
    ]
    assert f"step 7 diverged (3 steps in a row were skipped; the last: {why})" in log.divergence
    assert (log.last_accepted_step, log.last) == (4, 7)
    assert len(records) == 3  # the first skipped step of each series, and the one beyond the limit


def test_rows_say_how_often_each_stream_was_read(logged):
    """After a rewind from step 3 to step 1 the second step reads the fourth batch."""
    log, rows, *_ = logged
    log._data_step = lambda step: step + 2 * (step > 0)
    for step in (1, 2):
        take(log, step, skipped=step == 2)
    log.flush()
    assert [row["epochs"] for row in rows] == [{"a": 0.25, "b": 0.125}, {"a": 1.0, "b": 0.5}]


def test_a_run_that_was_stopped_among_refused_steps_counts_on(logged):
    log, *_, records = logged
    log.last_accepted_step = 4  # as recorded in the state of step 6
    take(log, 7, True, spike=True)
    log.flush()
    assert "more than 100 times its running mean" in log.divergence
    assert (log.last_accepted_step, log.last, len(records)) == (4, 7, 1)


def test_a_step_under_way_when_the_run_diverges_does_not_count(logged):
    log, rows, *_ = logged
    for step, skipped in enumerate([False, True, True, True, False], 1):
        take(log, step, skipped)
    log.flush()
    assert (log.last_accepted_step, log.last, rows[-1]["step"]) == (1, 4, 4)


@pytest.mark.parametrize(
    ("saved", "begins", "ends"),
    [
        ([], "lower optimizer.learning_rate", "from the beginning"),
        ([2, 3], "lower optimizer.learning_rate", "from step 3"),
        (
            [2, 4, 6],
            "move 4, 6 out of",
            "from step 2",
        ),  # 6 was skipped: it holds the parameters of 4
        ([4, 5, 6], "move 4, 5, 6 out of", "from the beginning"),
    ],
)
def test_the_way_on_leads_back_before_the_parameters_that_diverged(saved, begins, ends):
    advice = step_log.recovery_advice(saved, last_accepted_step=4)
    assert advice.startswith(begins) and advice.endswith(ends)
