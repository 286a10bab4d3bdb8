"""The doctor's figures about learning: expected branch scale, balance pull, load after N steps.

Tests that need a prepared run are in test_doctor.py.
"""

import dataclasses
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest

from moe_jax.cli import doctor
from moe_jax.config import Config, from_config_dict
from moe_jax.config_file import read_config_file
from moe_jax.moe.components import make_router
from moe_jax.moe.config import MoEConfig
from moe_jax.tools.doctor import branch_scale, spread
from moe_jax.tools.doctor.balance_pull import judge_pulls
from moe_jax.tools.doctor.branch_scale import Expected
from moe_jax.tools.doctor.checks import CHECKS
from moe_jax.tools.doctor.examine import report
from moe_jax.tools.doctor.finding import Finding, name_layers
from moe_jax.tools.doctor.spread import SPREAD, Trained
from moe_jax.tools.doctor.subject import Subject

ROOT = __file__.rpartition("/tests/")[0]
D, E = 64, 8


def config_of(moe: MoEConfig, width: int = D) -> Config:
    config = from_config_dict(read_config_file(f"{ROOT}/configs/tiny.py"))
    model = dataclasses.replace(config.model, moe=moe, width=width, vocab_size=259)
    return dataclasses.replace(config, model=model)


class Parts(Subject):
    """The parts of a Subject that the sentences read; no run is prepared."""

    moe_layers = ()  # pyright: ignore[reportAssignmentType]
    router_parameters = frozenset(["0"])  # pyright: ignore[reportAssignmentType]

    def __init__(self, moe: MoEConfig, layers: list[int], shrunk: bool = False):
        config = config_of(moe)
        model = SimpleNamespace(components=SimpleNamespace(router=make_router(moe)))
        self.plan = SimpleNamespace(config=config, asked=config, model=model)
        self.run = SimpleNamespace(config=config, model=model)
        self.moe_layers, self.shrunk = layers, shrunk


def numpy_probabilities(width: int, experts: int) -> np.ndarray:
    """The largest probability first, of random tokens and a router matrix of std 0.02."""
    draw = np.random.default_rng(7)
    x = draw.normal(size=(4096, width))
    logits = x @ (0.02 * draw.normal(size=(width, experts)))
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return -np.sort(-probs, axis=1)


@pytest.mark.parametrize(
    ("moe", "width"),
    [
        (MoEConfig(num_experts=8, router="switch", top_k=1), 64),
        (MoEConfig(num_experts=64, router="switch", top_k=1), 512),
        (MoEConfig(num_experts=16, top_k=4, options={"top_k": {"renormalize": False}}), 64),
    ],
)
def test_expected_ratio_is_the_root_of_the_sum_of_squared_weights(moe, width):
    router = make_router(moe)
    found = branch_scale.expected_ratio(config_of(moe, width), router)
    weights = numpy_probabilities(width, moe.num_experts)[:, : router.choices_per_token]
    if getattr(router, "renormalize", False):
        weights = weights / weights.sum(1, keepdims=True)
        assert found.weight_sum == pytest.approx(1)
    assert found.weight_sum == pytest.approx(weights.sum(1).mean(), rel=0.05)
    assert found.ratio == pytest.approx(math.sqrt((weights**2).sum(1).mean()), rel=0.05)


def test_shared_experts_add_the_variance_of_a_dense_layer():
    """Hash weights are 1 / K: K (1 / K)^2 + 1."""
    moe = MoEConfig(num_experts=E, top_k=2, router="hash", shared_experts=1)
    found = branch_scale.expected_ratio(config_of(moe), make_router(moe))
    assert found.ratio == pytest.approx(math.sqrt(1 / 2 + 1))


PLAIN = {"top_k": {"renormalize": False}}
SCALED = {"sigmoid_bias": {"routed_scale": 9.0}}


@pytest.mark.parametrize(
    ("moe", "expected", "ratios", "says"),
    [
        (MoEConfig(router="switch"), (0.16, 0.15), [0.2, 0.3], "all MoE layers .* 5 times small"),
        (MoEConfig(router="switch"), (0.16, 0.15), [0.2, 0.3], "Keep it if .* router top_k with"),
        (
            MoEConfig(num_experts=64, top_k=8, options=PLAIN),
            (0.1, 0.3),
            [0.09, 0.2],
            r"layer 1 .* sum to 0.3 at init .*model\.moe\.options\.top_k\.renormalize=True",
        ),
        (
            MoEConfig(router="sigmoid_bias", options=SCALED),
            (6.4, 9.0),
            [6.4, 6.4],
            r"6.4 times .* sum to 9 at init. Lower .*\.routed_scale",
        ),
        (MoEConfig(), (0.7, 1.0), [0.7, 0.1], "layer 3 .* 0.1 times .* do not explain it"),
        (MoEConfig(), (0.7, 1.0), [0.7, 2.1], "layer 3 .* 2.1 times .* do not explain it"),
        (MoEConfig(), (0.7, 1.0), [0.7, 0.36], ""),
    ],
)
def test_branch_outside_its_range_is_named(monkeypatch, moe, expected, ratios, says):
    monkeypatch.setattr(branch_scale, "measured_ratios", lambda subject: ratios)
    monkeypatch.setattr(branch_scale, "expected_ratio", lambda *given: Expected(*expected))
    finding = branch_scale.branch_scale(Parts(moe, [1, 3]))
    assert finding.ok and finding.warns == bool(says)
    assert_says(finding.fix, says)


def test_shrunk_run_is_judged_by_the_config_as_written(monkeypatch):
    monkeypatch.setattr(branch_scale, "measured_ratios", lambda subject: [0.6])
    monkeypatch.setattr(branch_scale, "expected_ratio", lambda *given: Expected(0.03, 0.03))
    moe = MoEConfig(num_experts=64, router="switch", top_k=1)
    finding = branch_scale.branch_scale(Parts(moe, [1], shrunk=True))
    assert finding.figure.endswith("; 0.03 expected of the config as written")
    assert finding.warns and "33 times smaller" in finding.fix
    assert finding.fix.startswith("In the config as written")


def assert_says(sentence: str, pattern: str) -> None:
    assert re.search(pattern, sentence), sentence


@pytest.mark.parametrize(
    ("weight", "keeps_state", "says"),
    [
        (0.01, False, ""),
        (0.0, False, "all MoE layers the balance loss is off: .* to about 0.05"),
        (0.002, False, "layer 0 the balance loss is too weak"),
        (0.002, True, ""),
        (3.0, False, "layer 1 the router learns from the balance loss .* lower .* about 0.05"),
        (30.0, True, "all MoE layers .* lower"),
    ],
)
def test_balance_gradient_outside_its_range_is_named(weight, keeps_state, says):
    """Ratios 1 and 4 per unit of weight: their geometric mean is 2, and 0.1 / 2 is 0.05."""
    finding = judge_pulls({0: 1.0, 1: 4.0}, weight, keeps_state)
    assert finding.ok and finding.warns == bool(says)
    assert_says(finding.fix, says)
    assert finding.figure.startswith(f"{weight:.2g} (layer 0) to {4 * weight:.2g} (layer 1) of")


def loads(first: list[float], last: list[float]) -> np.ndarray:
    """Loads [11, 1, E] of 800 assignments per step: six steps from one share, five of another."""
    way = np.clip(np.arange(11) / 6, 0, 1)[:, None]
    return np.round(800 * ((1 - way) * np.array(first) + way * np.array(last))).astype(int)[:, None]


EVEN = [1 / 8] * 8
HALF = [0.5, 0.5, 0, 0, 0, 0, 0, 0]  # K = 2: all tokens choose the same two experts
BARELY = [0.47, 0.47, *[0.01] * 6]  # 2.7 effective experts
UNEVEN = [0.35, 0.35, 0.1, 0.1, 0.025, 0.025, 0.025, 0.025]  # 4.6 effective experts


@pytest.mark.parametrize(
    ("first", "last", "verdict"),
    [
        (EVEN, EVEN, "spreads"),
        (EVEN, HALF, "collapses"),
        (EVEN, UNEVEN, "uneven"),
        (HALF, UNEVEN, "spreads"),  # more effective experts than at first
        (HALF, HALF, "collapses"),
        (HALF, BARELY, "collapses"),  # more than at first, and still collapsed
    ],
)
def test_verdict_on_a_layer(first, last, verdict):
    load = loads(first, last)
    [layer] = spread.judge(load, [3], 2)
    share = load[-5:, 0] / 800
    entropy = -np.sum(np.where(share > 0, share * np.log(np.maximum(share, 1e-99)), 0), axis=1)
    assert layer.verdict == verdict and layer.number == 3
    assert layer.busiest == pytest.approx((8 * max(first), 8 * share.max(1).mean()), rel=1e-3)
    assert layer.effective[1] == pytest.approx(np.exp(entropy).mean())
    assert layer.dead == (load[-5:].sum((0, 1)) == 0).sum()


@pytest.mark.parametrize(
    ("moe", "collapsed", "says"),
    [
        (MoEConfig(balance_weight=0.0), [0], r"layer 0 .* \(0\) to 0.1, .*, or .*first_dense=1"),
        (MoEConfig(balance_weight=0.01), [1], r"layer 1 .* 4 times .* 11 steps.*\(0.01\) to 0.1"),
        (MoEConfig(), [0, 1], "all MoE layers .* or use router sigmoid_bias.$"),
        (MoEConfig(router="sigmoid_bias"), [1], r"raise .*\.sigmoid_bias\.update_rate.$"),
        (MoEConfig(), [], ""),
    ],
)
def test_collapsed_layer_is_named_with_what_to_change(monkeypatch, moe, collapsed, says):
    both = [loads(EVEN, HALF if layer in collapsed else EVEN) for layer in (0, 1)]
    made = Trained(np.concatenate(both, axis=1), np.linspace(5, 4, 11), 0, 3)
    monkeypatch.setattr(spread, "train", lambda *given: made)
    finding = spread.load_spreads(Parts(moe, [0, 1]), 11, print)
    assert finding.ok == (not collapsed)
    assert_says(finding.fix, says)
    assert [line.split(":")[0].split()[-1] for line in finding.details] == [
        "collapses" if i in collapsed else "spreads" for i in (0, 1)
    ]
    assert "lm 5.00 -> 4.20 nats" in finding.figure  # the mean of 4.4, 4.3, 4.2, 4.1 and 4


def test_report_prints_details_and_advice():
    lines: list[str] = []
    report("one", Finding(True, "1", "Change it.", warns=True, details=("more",)), lines.append)
    report("two", Finding(True, "2", "Change it."), lines.append)
    report("three", Finding(False, "3", "Change it.", warns=True), lines.append)
    assert [line.split()[0] for line in lines] == ["warn", "more", "Change", "ok", "FAIL", "Change"]


def test_layers_are_named():
    assert name_layers([3], 4) == "layer 3" and name_layers([1], 1) == "layer 1"
    assert name_layers([1, 3, 5], 4) == "layers 1, 3 and 5"


@pytest.mark.parametrize("steps", [0, 30])
def test_steps_add_the_last_check(monkeypatch, steps):
    asked = []
    monkeypatch.setattr(doctor, "make_subject", lambda *given: None)
    monkeypatch.setattr(doctor, "examine", lambda subject, checks, say: asked.append(checks) or 0)
    monkeypatch.setattr(doctor.jax.config, "update", lambda name, value: None)
    assert doctor.main(["doctor", f"--config={ROOT}/configs/tiny.py", f"--steps={steps}"]) == 0
    assert list(asked[0]) == [*CHECKS, *([SPREAD] if steps else [])]
