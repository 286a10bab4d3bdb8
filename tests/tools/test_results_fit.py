"""Scaling laws fitted to synthetic losses of each law, and to hand-made workdirs."""

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from made_runs import config, train_row, write_run
from small_run import ONE_LAYER

from moe_jax.cli.results import main
from moe_jax.errors import UserError
from moe_jax.tools.results.fit import HeldOut, classes, fit, predict, shortage
from moe_jax.tools.results.laws import (
    LAWS,
    S_BASE,
    Saturation,
    design,
    effective_experts,
    log_loss,
)
from moe_jax.tools.results.read import read_runs

SIZES, HORIZONS = (1e7, 3e7, 1e8, 3e8), (1e9, 4e9, 1.6e10, 6.4e10)
# Coefficients of each law.  Clark's are those of S-BASE (arXiv 2202.01169, table 3), Chinchilla's
# those of Hoffmann et al. (arXiv 2203.15556, section 3.3); those of the joint law are made up.
TRUE = {
    "clark": {"a": -0.082, "b": -0.108, "c": 0.009, "d": 1.104},
    "chinchilla": {"A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28, "E": 1.69},
    "joint": {
        "a": 36.0,
        "delta": 0.2285,
        "alpha": -0.19,
        "gamma": -0.0135,
        "b": 36.0,
        "omega": -0.0553,
        "beta": -0.1775,
        "zeta": -0.001,
        "c": 1.36,
    },
}
GRIDS = {
    "clark": (SIZES, (1.0, 8.0, 32.0, 128.0), (1.3e11,)),
    "chinchilla": ((*SIZES, 1e9), (1.0,), HORIZONS),
    "joint": (SIZES, (1.0, 8.0, 64.0), HORIZONS),
}


def grid(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N, E and D of every combination of the law's grid."""
    n, e, d = np.meshgrid(*GRIDS[name], indexing="ij")
    return n.ravel(), e.ravel(), d.ravel()


def exact(name: str, n: np.ndarray, e: np.ndarray, d: np.ndarray) -> np.ndarray:
    """The losses of the law with its coefficients in TRUE, written down from the papers."""
    t = TRUE[name]
    e_hat = 1 / (1 / (e - 1 + 1 / (1 / 1.847 - 1 / 314.478)) + 1 / 314.478)
    if name == "clark":
        log_n, log_e = np.log10(n), np.log10(e_hat)
        return 10 ** (t["a"] * log_n + t["b"] * log_e + t["c"] * log_n * log_e + t["d"])
    if name == "chinchilla":
        return t["E"] + t["A"] / n ** t["alpha"] + t["B"] / d ** t["beta"]
    by_n = t["a"] * e_hat ** t["delta"] * n ** (t["alpha"] + t["gamma"] * np.log(e_hat))
    by_d = t["b"] * e_hat ** t["omega"] * d ** (t["beta"] + t["zeta"] * np.log(e_hat))
    return by_n + by_d + t["c"]


@pytest.mark.parametrize("name", LAWS)
def test_exact_losses_give_the_coefficients(name):
    """Within 1%, or 1e-5 for an exponent near 0: a joint law of nine coefficients is recovered to
    1e-6 where L-BFGS stops, so 1% would only hide a wrong formula in the smallest, zeta."""
    n, e, d = grid(name)
    loss = exact(name, n, e, d)
    found = fit(LAWS[name], n, e, d, loss, resamples=0)
    assert list(found.values) == list(TRUE[name])
    assert found.values == pytest.approx(TRUE[name], rel=1e-4, abs=1e-6)
    assert found.fitted == pytest.approx(loss, rel=1e-7)
    assert predict(found, n * 3, e, d) == pytest.approx(exact(name, n * 3, e, d), rel=1e-5)
    assert found.intervals == {} and found.resamples == 0
    if name == "clark":  # the bounds of effective experts are not fitted
        other = fit(LAWS[name], n, e, d, loss, Saturation(1.2, 64.0), resamples=0)
        assert abs(other.fitted / loss - 1).max() > 1e-4


@pytest.mark.parametrize("name", LAWS)
def test_noisy_losses_predict_the_largest_size(name):
    """The prediction is held to the loss without its own noise, whose two sigma are 0.2%."""
    n, e, d = grid(name)
    true = exact(name, n, e, d)
    noisy = true * np.exp(1e-3 * np.random.default_rng(1).normal(size=len(true)))
    found = fit(LAWS[name], n, e, d, noisy, resamples=20)
    held = found.held_out
    assert isinstance(held, HeldOut)
    assert set(n[held.runs]) == {max(n)} and len(held.runs) == sum(n == max(n))
    assert held.predicted == pytest.approx(true[held.runs], rel=2e-3)
    assert held.error == pytest.approx(held.predicted / noisy[held.runs] - 1)
    assert found.resamples == 20
    assert list(found.intervals) == list(TRUE[name])
    for key, (low, high) in found.intervals.items():
        assert low < found.values[key] < high
        # Twice a 90% interval is 6.6 standard deviations wide.
        assert abs(found.values[key] - TRUE[name][key]) < high - low
    if name == "clark":
        again = fit(LAWS[name], n, e, d, noisy, resamples=20)
        assert again.intervals == found.intervals


def test_outliers_count_linearly():
    """One run that diverged moves least squares by 2%, and the Huber loss by less than 0.1%."""
    n, e, d = grid("clark")
    loss = exact("clark", n, e, d)
    wrong = loss.copy()
    wrong[5] *= 1.3
    found = fit(LAWS["clark"], n, e, d, wrong, resamples=0)
    assert np.delete(found.fitted, 5) == pytest.approx(np.delete(loss, 5), rel=1e-3)


def test_effective_experts_saturate():
    e = np.array([1.0, 2.0, 64.0, 1e9])
    found = effective_experts(e, Saturation(1.5, 100.0))
    assert found[0] == pytest.approx(1.5) and found[-1] == pytest.approx(100.0)
    assert all(np.diff(found) > 0)
    for start, maximum in ((0.0, 10.0), (5.0, 5.0), (1.0, float("inf")), (float("nan"), 9.0)):
        with pytest.raises(UserError, match=r"--fit_e_start=.*E_start must be above 0 and below"):
            effective_experts(e, Saturation(start, maximum))


def test_a_design_gives_the_log_loss():
    n, e, d = grid("joint")
    theta = np.array([np.log(v) if k in "abc" else v for k, v in TRUE["joint"].items()])
    found = log_loss(design(LAWS["joint"], n, e, d, S_BASE), theta)
    assert found == pytest.approx(np.log(exact("joint", n, e, d)))


def test_neighbouring_sizes_are_one_class():
    """Routers of other numbers of experts make N of one size differ."""
    assert list(classes(np.array([300.0, 100.0, 110.0, 1000.0, 330.0]))) == [1, 0, 0, 2, 1]


def test_the_largest_size_is_held_out_with_all_its_experts():
    n, e, d = grid("clark")
    n = n * (1 + 1e-3 * e)  # routers
    found = fit(LAWS["clark"], n, e, d, exact("clark", n, e, d), resamples=0)
    assert isinstance(found.held_out, HeldOut) and list(found.held_out.runs) == [12, 13, 14, 15]


def points(*settings: tuple[float, float, float]) -> tuple[np.ndarray, ...]:
    return tuple(np.array(column, float) for column in zip(*settings, strict=True))


N, D = 1e6, 1e9


@pytest.mark.parametrize(
    ("law", "settings", "why"),
    [
        (
            "clark",
            [(N, 1, D), (2 * N, 1, D), (N, 8, D), (2 * N, 8, 2 * D)],
            "one horizon, and .* 2,000,000,000 tokens: use",
        ),
        ("clark", [(N, 1, D), (2 * N, 1, D), (N, 8, D), (2 * N, 8, D)] * 3, r"5 .* \(N, E\).* 4:"),
        ("clark", [(N * k, 1, D) for k in (1, 2, 3, 4, 5)], "2 values of E .* have 1: add"),
        # N varies at one E, and E at one N: log N log E is no new direction.
        (
            "clark",
            [*[(N * k, 1, D) for k in (1, 2, 4)], (N, 8, D), (N, 64, D)],
            "several values of E",
        ),
        ("chinchilla", [(N * k, 1, D * k) for k in (1, 2, 4, 8, 16)], r"6 .* \(N, D\).* have 5"),
        ("chinchilla", [(N * k, 1, D * j) for k in (1, 2) for j in (1, 2, 4)], "3 values of N"),
        ("chinchilla", [(N * k, 1, D * j) for k in (1, 2, 4) for j in (1, 2)], "3 values of D"),
        (
            "chinchilla",
            [(N * k, k, D * j) for k in (1, 2, 4) for j in (1, 2, 4)],
            "one E, and these have 1 to 4: use",
        ),
        ("joint", [(N * k, 2, D * j) for k in (1, 2, 4) for j in (1, 2, 4, 8)], "2 values of E"),
        ("joint", [(N, 1, D)], "10 different settings of"),
    ],
)
def test_runs_that_do_not_determine_a_law_are_refused(law, settings, why):
    n, e, d = points(*settings)
    with pytest.raises(UserError, match=f"^--fit={law} needs .*{why}") as raised:
        fit(LAWS[law], n, e, d, np.ones_like(n))
    assert "\n" not in str(raised.value)


def test_no_runs_are_refused():
    none = np.zeros(0)
    assert all("have 0: add runs" in shortage(law, none, none, none) for law in LAWS.values())


# Ten places of the joint law's grid that determine it.
TEN = (1, 2, 4, 11, 18, 19, 20, 21, 34, 43)


def test_too_few_settings_have_no_intervals_and_no_held_out_size():
    """Ten settings and nine coefficients: few resamples have nine settings."""
    n, e, d = grid("joint")
    few = np.array(TEN)
    n, e, d = n[few], e[few], d[few]
    found = fit(LAWS["joint"], n, e, d, exact("joint", n, e, d), resamples=4)
    assert found.intervals == {}
    assert isinstance(found.held_out, str)
    assert found.held_out.startswith("without the largest size, --fit=joint needs")


# Runs on disk -----------------------------------------------------------------------------------


def body(width: int, experts: int) -> int:
    """N of one layer, without embedding and head.

    Two experts of `width` per token are as large as the dense FFN, and there is a router.
    """
    attention, norms, ffn = 4 * width * 2 * 16, 2 * width, 3 * width * 2 * width
    return attention + norms + ffn + width * experts + width


def sized(folder: Path, width: int, experts: int, text: str = "aa", **more) -> None:
    """Write a finished run of one width and number of experts (0: dense), by Clark's law."""
    kind = {"model.moe.num_experts": experts} if experts else {"model.dense": True}
    wide = {"model.width": width, "model.ffn_width": 2 * width, "model.moe.expert_width": width}
    n, e = np.array([float(body(width, experts))]), np.array([max(1.0, experts / 2)])
    row = {"eval_rows": 64, "eval_tokens": 2048}
    held = [row | {"step": 4, "eval_loss": 9.0}]
    held.append(row | {"step": 8, "eval_loss": exact("clark", n, e, n)[0]})
    made = config(**{"eval.rows": 64} | ONE_LAYER | wide | kind | more)
    write_run(folder, made, [train_row(8, 2.0), *held])
    (folder / "data.json").write_text(json.dumps({"fingerprint": text}))


def sweep(folder: Path) -> None:
    for width in (32, 64, 128):
        for experts in (0, 4, 8):
            sized(folder / f"w{width}e{experts}", width, experts)


def test_n_e_and_d_of_runs(tmp_path):
    """E is num_experts / K, and a dense model has E = 1."""
    sized(tmp_path / "a", 32, 8)
    sized(tmp_path / "b", 64, 0)
    sparse, dense = read_runs(tmp_path)
    assert (sparse.active_body, dense.active_body) == (body(32, 8), body(64, 0))
    assert sparse.active_body == (sparse.active or 0) - 2 * 258 * 32
    assert (sparse.expansion, dense.expansion) == (4.0, 1.0)
    assert (sparse.step_tokens, sparse.last_step) == (32 * 32, 8)


def test_the_report_of_a_sweep(tmp_path, capsys, monkeypatch):
    sweep(tmp_path)
    fewer = functools.partial(fit, resamples=20)
    monkeypatch.setattr("moe_jax.tools.results.fit_runs.fit", fewer)
    sized(tmp_path / "half", 32, 16, **{"train.steps": 16})
    plot = tmp_path / "plot.svg"
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        arguments = [f"--workdir={tmp_path}", "--fit=clark", f"--plot={plot}"]
        assert main(["moe-results", *arguments]) == 0
    out = capsys.readouterr().out
    assert "9 runs, Huber loss (delta 0.001) of log L, 90% intervals from 20 resamples" in out
    assert "Ê saturates from E_start 1.847 to E_max 314.478." in out
    values = dict(re.findall(r"^\| ([abcd]) +\| +(-?[\d.]+) \|", out, re.MULTILINE))
    assert {key: float(value) for key, value in values.items()} == TRUE["clark"]
    assert len(re.findall(r"^\| w\d+e\d .* \+0\.00% \|$", out, re.MULTILINE)) == 9 + 3
    assert "mean absolute error of the largest size: 0.00%" in out
    assert "half left out: it is not finished (step 8 of 16)" in out
    texts = re.findall(r">([^<]*)</text>", plot.read_text(encoding="utf-8"))
    assert {"E=1, D=8.2k", "E=2, D=8.2k", "E=4, D=8.2k", "residuals"} <= set(texts)


def test_mistakes_are_one_sentence(tmp_path):
    sized(tmp_path / "a", 32, 0)
    run = ["moe-results", f"--workdir={tmp_path}"]
    with pytest.raises(UserError, match=r"--fit 'clerk' is unknown.*clark"):
        main([*run, "--fit=clerk"])
    with pytest.raises(UserError, match="--fit_e_start=400 and --fit_e_max=9: E_start must"):
        main([*run, "--fit=joint", "--fit_e_start=400", "--fit_e_max=9"])
    with pytest.raises(UserError, match="--fit=clark needs at least 5 different settings"):
        main([*run, "--fit=clark"])
    sized(tmp_path / "b", 64, 0, text="bb")
    with pytest.raises(UserError, match="--fit=clark needs one held-out sample: the runs were"):
        main([*run, "--fit=clark"])
