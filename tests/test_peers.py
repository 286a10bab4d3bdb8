"""The comparison with peers: a config as the peer's model, and the table.  Needs no torch."""

import pytest
from small_run import ROOT

from benchmarks.peers.compare import Result, plan, summary
from benchmarks.peers.shape import peer_shape
from moe_jax.config import Config, from_config_dict
from moe_jax.config_file import read_config_file
from moe_jax.errors import UserError


def config(name: str, **overrides: object) -> Config:
    loaded = read_config_file(str(ROOT / "configs" / f"{name}.py"))
    loaded.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return from_config_dict(loaded)


def test_few_large_experts():
    shape = peer_shape(config("bench_mixtral_2b"))
    model = shape["model"]
    assert (shape["class"], shape["dtype"], shape["sequence_length"]) == (
        "Mixtral",
        "bfloat16",
        4096,
    )
    assert (model["num_local_experts"], model["num_experts_per_tok"]) == (8, 2)
    assert (model["num_attention_heads"], model["num_key_value_heads"]) == (16, 4)
    # By hand: attention, router, experts and two norms in each of 6 layers, embedding and head.
    layer = 2 * 2048**2 + 2 * 2048 * 512 + 2048 * 8 + 8 * 3 * 2048 * 7168 + 2 * 2048
    assert shape["params"] == 6 * layer + 2 * 32000 * 2048 + 2048


def test_many_small_experts():
    shape = peer_shape(config("bench_olmoe_half"))
    model = shape["model"]
    assert (shape["class"], model["num_experts"], model["norm_topk_prob"]) == ("Olmoe", 64, False)
    assert "num_local_experts" not in model


def test_the_vocabulary_of_bytes():
    assert peer_shape(config("tiny"))["model"]["vocab_size"] > 256


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("tiny", "model.dense", True),
        ("tiny", "model.moe.shared_experts", 1),
        ("tiny", "model.moe.router", "switch"),
        ("tiny", "model.qk_norm", "head"),
        ("tiny", "model.moe.options.top_k.renormalize", False),
        ("bench_olmoe_half", "model.head_dim", 64),
    ],
)
def test_what_the_peer_has_not(name, key, value):
    with pytest.raises(UserError, match=rf"config\.{key} is"):
        peer_shape(config(name, **{key.replace(".", "__"): value}))


def result(side: str, batch: int, speed: float | None) -> Result:
    row = {"model_tflops_per_s": speed, "step_ms": 1000 / (speed or 1), "peak_memory_mib": 2048}
    return Result("configs/a.py", side, batch, row if speed else None)


RESULTS = [
    *(result("peer", 4, speed) for speed in (300.0, 310.0, 290.0)),
    *(result("ours", 4, speed) for speed in (450.0, 900.0, 300.0)),
    result("peer", 8, None),
    result("ours", 8, 480.0),
]


def test_table():
    heading, four, eight, best = summary(RESULTS)
    assert len(heading) == len(four) == len(eight) == len(best)
    assert four[:3] == ["a", "4", "3.3"]
    assert (four[3], four[6], four[-1]) == ("300", "450", "1.50")
    assert eight[2:] == ["failed", "-", "-", "2.1", "480", "2", "-"]
    assert best[1:] == ["best", "batch 4", "300", "", "batch 8", "480", "", "1.60"]


def test_table_where_a_side_failed_throughout():
    rows = summary([result("peer", 4, None), result("ours", 4, 480.0)])
    assert rows[-1][2] == "failed" and rows[-1][-1] == "-"


def test_rounds():
    assert plan([], "configs/a.py", [4, 8]) == [
        ("peer", 4),
        ("ours", 4),
        ("peer", 8),
        ("ours", 8),
    ]
    assert plan(RESULTS, "configs/a.py", [4, 8]) == [("peer", 4), ("ours", 8)]
    assert plan(RESULTS, "configs/b.py", [4]) == [("peer", 4), ("ours", 4)]
