"""Training in bfloat16 follows training in float32."""

import itertools
import statistics

import jax
import pytest
from small_run import ROOT, small_config, train_rows, write_corpus

from moe_jax.data.feed import DeviceFeed, batch_shardings
from moe_jax.run.loop import compile_step
from moe_jax.run.restore import restore_or_init_state
from moe_jax.run.setup import prepare
from moe_jax.tools.bench.measure import Steps

# Limits on the relative difference of the smoothed language-model loss.  docs/performance.md has
# the measured values: configs/tiny.py over 300 steps.
WINDOW, LARGEST, MEAN = 20, 0.02, 0.0075
PRECISIONS = ("float32", "bfloat16")
STEPS = 24
LAYER = {"model__num_layers": 1, "model__moe__every": 1, "optimizer__schedule": "constant"}


def smoothed(losses, window):
    """Means of the losses over a moving window."""
    sums = [0.0, *itertools.accumulate(losses)]
    return [(b - a) / window for a, b in zip(sums, sums[window:], strict=False)]


def differences(float32, bfloat16):
    """|bfloat16 - float32| / float32 per step."""
    return [abs(b - a) / a for a, b in zip(float32, bfloat16, strict=True)]


@pytest.mark.lifecycle
def test_the_first_steps_in_bfloat16_follow_float32(tmp_path):
    files = write_corpus(tmp_path / "corpus")
    curves = []
    for precision in PRECISIONS:
        config = small_config(files, precision=precision, train__steps=STEPS, **LAYER)
        run = prepare(config, tmp_path / precision, lambda line: None, jax.devices()[:1])
        state = restore_or_init_state(run, "", lambda line: None)
        with DeviceFeed(run.batches.rows, run.microbatch, batch_shardings(run.mesh), 0) as feed:
            _, batch = next(feed)
            steps = Steps(compile_step(run), state, feed, batch)
            steps.run(STEPS)
        curves.append(smoothed(steps.losses, window=4))
    first, *_, last = curves[0]
    assert last < 0.8 * first, "nothing was learned: nothing was followed"
    assert 0 < max(differences(*curves)) < LARGEST


@pytest.mark.full
def test_tiny_in_bfloat16_stays_in_the_stated_band(run_cli, tmp_path):
    """Two whole runs of 300 steps: a quarter of an hour on two cores."""
    curves = []
    for precision in PRECISIONS:
        workdir = tmp_path / precision
        values = {
            "precision": precision,
            "train.steps": 300,
            "train.log_every": 1,
            "eval.every": 0,
            "eval.rows": 32,
            "eval.samples": 0,
        }
        arguments = [f"--config.{name}={value}" for name, value in values.items()]
        config = f"--config={ROOT / 'configs' / 'tiny.py'}"
        command = ["moe_jax", "train", config, f"--workdir={workdir}", *arguments]
        done = run_cli(command, timeout=7200)
        assert done.code == 0, done.err
        curves.append(smoothed([row["lm_loss"] for row in train_rows(workdir)], WINDOW))
    far = differences(*curves)
    assert max(far) < LARGEST
    assert statistics.mean(far) < MEAN
