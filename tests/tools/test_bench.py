"""The line of JSON that the bench command prints."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from small_run import ROOT, flags, write_corpus

from moe_jax.cli.bench import main
from moe_jax.config import Config
from moe_jax.data.config import DataConfig
from moe_jax.errors import UserError
from moe_jax.model.config import ModelConfig
from moe_jax.tools.bench.breakdown import COLLECTIVE, OTHER, account, instruction_parts
from moe_jax.tools.bench.measure import Steps
from moe_jax.tools.bench.random_rows import random_rows

KEYS = (
    "config step_ms step_ms_p10 step_ms_p90 tokens_per_s model_tflops_per_s mfu "
    "forward_backward_ms compile_seconds first_step_seconds peak_memory_mib loss drop_fraction "
    "params active_params steps devices device jax collectives_sent_mb"
)


def test_one_json_line(tmp_path, capsys):
    config, *rest = flags(tmp_path / "bench", write_corpus(tmp_path / "text"))
    main(["bench", "--config", config.removeprefix("--config="), *rest, "--steps=2", "--gradients"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    row = json.loads(lines[0])
    assert sorted(row) == sorted(KEYS.split())
    assert row["config"] == str(ROOT / "configs" / "tiny.py")
    assert (row["steps"], row["devices"]) == (2, 8)
    assert 0 < row["step_ms_p10"] <= row["step_ms"] <= row["step_ms_p90"]
    # 32 rows of 32 tokens per step; both numbers are rounded for display.
    assert row["tokens_per_s"] * row["step_ms"] / 1e3 == pytest.approx(32 * 32, rel=0.05)
    assert row["first_step_seconds"] > row["compile_seconds"] > 0
    assert 0 < row["active_params"] < row["params"]
    assert row["collectives_sent_mb"] > 0
    assert not (tmp_path / "bench").exists()  # only the store is kept


def test_the_next_step_runs_while_one_is_read(monkeypatch):
    """Metrics are read on the host, because a device computation would wait for the next step."""
    order = []

    class OnDevice(int):
        """Metrics of a step, with which any computation raises AttributeError."""

    def step_fn(state, batch):
        order.append(f"start {state}")
        return state + 1, OnDevice(state)

    def device_get(metrics):
        order.append(f"read {metrics}")
        stats = SimpleNamespace(
            assignments=np.array([4, 4]), outcomes=SimpleNamespace(kept=np.array([3, 3]))
        )
        loss = SimpleNamespace(lm=np.float32(metrics))
        return SimpleNamespace(loss=loss, moe=SimpleNamespace(stats=stats))

    monkeypatch.setattr("jax.device_get", device_get)
    monkeypatch.setattr("jax.block_until_ready", lambda tree: pytest.fail("waited otherwise"))
    steps = Steps(step_fn, 0, itertools.repeat((0, "batch")), "batch")
    assert len(steps.run(3)) == 3
    assert order == ["start 0", "start 1", "read 0", "start 2", "read 1", "read 2"]
    assert (steps.losses, steps.dropped) == ([0.0, 1.0, 2.0], [0.25] * 3)


def test_random_rows_are_a_function_of_seed_step_and_row():
    config = Config(model=ModelConfig(vocab_size=1000), data=DataConfig(sequence_length=64))
    rows = random_rows(config)
    batch, again = rows(3, np.arange(4)), rows(3, np.array([2]))
    np.testing.assert_array_equal(batch.tokens_BT[2:3], again.tokens_BT)
    np.testing.assert_array_equal(batch.tokens_BT[:, 1:], batch.targets_BT[:, :-1])
    assert len(np.unique(batch.tokens_BT)) > 200 and batch.tokens_BT.max() < 1000
    assert (rows(4, np.arange(4)).tokens_BT != batch.tokens_BT).any()


def test_no_steps(tmp_path):
    with pytest.raises(UserError, match="--steps=0: give 1 or more"):
        main(["bench", *flags(tmp_path, ""), "--steps=0"])


def test_collectives_count_where_nothing_else_runs():
    events = [
        ("experts", 0.0, 10.0),
        ("collectives", 8.0, 15.0),  # two beside the experts, five exposed
        ("collectives", 20.0, 24.0),  # three beside attention
        ("attention", 21.0, 30.0),
    ]
    parts, hidden = account(events, on_device=True)
    assert parts == {"experts": 10.0, "attention": 9.0, "collectives": 6.0, "idle": 5.0}
    assert sum(parts.values()) == 30.0 and hidden == 5.0
    assert account(events, on_device=False)[0]["collectives"] == 11.0


def test_an_instruction_belongs_to_its_innermost_scope():
    text = """HloModule step

%fused (p: f32[4]) -> f32[4] {
  ROOT %exp = f32[4]{0} exponential(%p), metadata={op_name="jit(step)/router/exp"}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %mul = f32[4]{0} multiply(%x, %x), metadata={op_name="jit(step)/dispatch/jvp(experts)/mul" id=3}
  %start = (f32[4]{0}, f32[8]{0}) all-gather-start(%mul), metadata={op_name="jit(step)/dispatch/x"}
  ROOT %add = f32[4]{0} add(%mul, %x), metadata={source_file="router.py"}
}
"""
    assert instruction_parts(text) == {
        "exp": "router",
        "mul": "experts",
        "start": COLLECTIVE,
        "add": OTHER,
    }
