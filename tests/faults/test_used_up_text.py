"""Check 17: data.max_epochs ends a run before the first step that would need more text."""

import signal

import numpy as np
import pytest
from bad_batches import patches
from small_run import eval_rows, flags, train_rows
from trainer import OVERRIDES, checkpoints

from moe_jax.cli.check import check
from moe_jax.cli.train import main
from moe_jax.data.store import open_store
from moe_jax.parallel.distributed import DONE
from moe_jax.train import guard

MANY = 10_000
# No log line, evaluation or checkpoint is due at the step where the text ends.
RUN = OVERRIDES | {"train.steps": MANY, "train.log_every": 1000, "checkpoint.every_steps": 0}


def steps_of(workdir, epochs: int) -> int:
    """The number of whole batches in `epochs` epochs, from the length of the text."""
    (manifest,) = (workdir.parent / "stores").glob("*/manifest.json")
    windows = -(-(open_store(manifest.parent).train.num_tokens - 1) // 32)
    return epochs * windows // 32


@pytest.mark.full
def test_a_run_ends_with_its_text(tmp_path, corpus, trainers):
    workdir, twice = tmp_path / "run", tmp_path / "twice"

    def run(where, epochs):
        arguments = flags(where, corpus, **RUN, **{"data.max_epochs": epochs})
        process = trainers(arguments)
        assert process.finish() == DONE, process.text
        return arguments, process.lines

    arguments, lines = run(workdir, 1)
    end = steps_of(workdir, 1)
    notice = f"data.max_epochs 1: the text is used up after step {end}; the run ends there, before"
    assert f"{notice} train.steps {MANY}, with the learning rate at 100% of its peak" in lines
    assert f"the text is used up: step {end} of {MANY}" in lines
    assert checkpoints(workdir).steps() == [end] and checkpoints(workdir).verify(end) is None
    assert [row["step"] for row in train_rows(workdir)] == [1, end]
    assert [row["step"] for row in eval_rows(workdir)] == [end]
    assert check(arguments, 1)["finished"]

    # ---- the same command again has nothing to do
    metrics = (workdir / "metrics.jsonl").read_bytes()
    _, lines = run(workdir, 1)
    assert (
        f"the text is used up: step {end} of {MANY} is done, raise data.max_epochs to continue"
        in lines
    )
    assert (workdir / "metrics.jsonl").read_bytes() == metrics

    # ---- with a second epoch: bit-equal to a run that was never stopped
    _, lines = run(workdir, 2)
    assert f"resuming from step {end}" in lines
    assert "data.max_epochs was 1, is 2: same batches, the run may end at a different step" in lines
    later = steps_of(workdir, 2)
    assert f"the text is used up: step {later} of {MANY}" in lines and later >= 2 * end
    run(twice, 2)
    for name in ("params", "optimizer", "router"):
        mine, straight = (checkpoints(one).digest(later, name) for one in (workdir, twice))
        assert mine == straight


@pytest.mark.full
@pytest.mark.parametrize("at", [4, 1])
def test_data_left_out_by_going_back_is_used_up(tmp_path, corpus, monkeypatch, capfd, at):
    """The bad batches are in the middle of the text, or reach up to its last batch."""
    asked: list[int] = []
    straight = tmp_path / "straight"
    more = RUN | {"data.max_epochs": 1, "checkpoint.every_steps": 2, "train.max_skipped": 1}
    before = signal.getsignal(signal.SIGTERM)
    assert main(["train", *flags(straight, corpus, **more)]) == DONE
    data = steps_of(straight, 1)
    bad = dict.fromkeys((data - at - 1, data - at), np.nan)
    for change in (*patches(bad, asked), (guard, "MIN_ACCEPTED", 3)):
        monkeypatch.setattr(*change)
    assert main(["train", *flags(tmp_path / "run", corpus, **more)]) == DONE
    signal.signal(signal.SIGTERM, before)
    assert max(asked) == data - 1 and "REWIND 1 of 2" in capfd.readouterr().out
    end = checkpoints(tmp_path / "run").steps()[-1]
    left_out = data - end
    assert left_out >= 2 and sorted(set(asked)) == list(range(data))
    assert [row["step"] for row in eval_rows(tmp_path / "run")] == [end]
