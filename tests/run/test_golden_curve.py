"""Twenty steps of a small run give the recorded losses."""

import jax
from small_run import EXACT, small_config, write_corpus

from moe_jax.data.feed import DeviceFeed, batch_shardings
from moe_jax.run.loop import lower_step
from moe_jax.run.restore import restore_or_init_state
from moe_jax.run.setup import prepare
from moe_jax.run.step_log import step_row

STEPS = 20
LOGGED = ("loss", "lm_loss", "balance_loss", "z_loss", "grad_norm", "kept", "dropped", "padding")


def test_losses(tmp_path, x64, golden):
    """In float64, where machines differ only by rounding and drop the same tokens."""
    config = small_config(
        write_corpus(tmp_path / "text", 16),
        precision="float64",
        train__steps=STEPS,
        train__accumulation=2,
        model__moe__every=1,
        optimizer__warmup_steps=4,
    )
    run = prepare(config, tmp_path / "run", lambda line: None, jax.devices()[:1])
    state = restore_or_init_state(run, "", lambda line: None)
    curve = {name: [] for name in LOGGED}
    step_fn = None
    with DeviceFeed(run.batches.rows, run.microbatch, batch_shardings(run.mesh), 0, STEPS) as feed:
        for _, batch in feed:
            step_fn = step_fn or lower_step(run).compile(EXACT)
            state, metrics = step_fn(state, batch)
            row = step_row(metrics)
            for name in LOGGED:
                curve[name].append(row[name])
    minor = "_".join(jax.__version__.split(".")[:2])
    golden(f"losses_jax_{minor}", curve, rtol=1e-9)
