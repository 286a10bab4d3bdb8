"""The benchmark's one line."""

import json

import pytest
from small_run import ROOT, flags, write_corpus

from moe_jax.bench.__main__ import main
from moe_jax.errors import UserError

KEYS = (
    "config step_ms step_ms_p10 step_ms_p90 tokens_per_s model_tflops_per_s mfu "
    "forward_backward_ms compile_seconds first_step_seconds peak_memory_mib loss drop_fraction "
    "params active_params steps devices device jax"
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
    # 32 rows of 32 tokens a step; both numbers are rounded for people.
    assert row["tokens_per_s"] * row["step_ms"] / 1e3 == pytest.approx(32 * 32, rel=0.05)
    assert row["first_step_seconds"] > row["compile_seconds"] > 0
    assert 0 < row["active_params"] < row["params"]
    assert not (tmp_path / "bench").exists()  # only the store is kept


def test_no_steps(tmp_path):
    with pytest.raises(UserError, match="--steps=0: time 1 step or more"):
        main(["bench", *flags(tmp_path, ""), "--steps=0"])
