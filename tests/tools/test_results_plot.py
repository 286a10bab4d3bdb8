"""The text in the plot of results, read from its SVG; pixels are not compared."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from made_runs import FINISHED, config, write_run

from moe_jax.tools.results.group import Group, group, labels
from moe_jax.tools.results.plot import write_plot
from moe_jax.tools.results.read import DONE, Result, read_runs


def legend(tmp_path: Path, groups: Sequence[Group]) -> tuple[list[str], str]:
    """Return the lines of the plot's legend, and the whole SVG."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        write_plot(tmp_path / "plot.svg", groups)
    text = (tmp_path / "plot.svg").read_text()
    return re.findall(r">(\d+  .*)  \([\d.]+k\)</text>", text), text


def finished(name: str, **overrides: object) -> Result:
    curve = ((1e9, 3.0), (2e9, 2.5))
    return Result(name, DONE, config(**overrides), best_heldout=2.5, parameters=1000, curve=curve)


def test_unrelated_runs_are_called_by_their_folders(tmp_path):
    """Twenty runs, for which a label with all differing keys would be too long."""
    results = []
    for number in range(20):
        overrides = {
            "model.moe.num_experts": 4 + number,
            "optimizer.learning_rate": 1e-3 * (1 + number % 3),
            "train.batch_size": 8 * (1 + number % 5),
            "data.files": f"/somewhere/far/away/{number % 7}/*.txt",
        }
        results.append(finished(f"run-{number:02d}", **overrides))
    results.insert(0, finished("long" * 30))
    shown, _ = legend(tmp_path, group(results))
    assert len(shown) == 21 and len(set(shown)) == 21
    assert sum("run-" in text for text in shown) == 20
    assert all(len(text) < 50 for text in shown)
    assert "longlong" in shown[0] and "..." in shown[0]


def test_short_differences_are_shown_whole(tmp_path):
    for experts in (4, 8):
        for rate in (1e-3, 3e-3):
            overrides = {"model.moe.num_experts": experts, "optimizer.learning_rate": rate}
            write_run(tmp_path / f"{experts}-{rate}", config(**overrides), FINISHED)
    shown, _ = legend(tmp_path, group(read_runs(tmp_path)))
    assert shown[0] == "1  num_experts=4 learning_rate=0.001"


@pytest.mark.parametrize("more", [{}, {"data.sequence_length": 64, "train.batch_size": 16}])
def test_a_mixture_is_said_by_its_shares(tmp_path, more):
    """The label has the shares of all sources, even if one weight differs, but no `data.files`."""
    for name, weight in (("even", 1.0), ("code", 3.0)):
        blend = {"web": {"files": "w"}, "code": {"files": "c", "weight": weight}}
        with_files = config(**{"data.files": name}, **more)
        data = dataclasses.replace(with_files.data, mixture=blend)
        write_run(tmp_path / name, dataclasses.replace(with_files, data=data), FINISHED)
    write_run(tmp_path / "plain", config(), FINISHED)
    found = labels(read_runs(tmp_path))
    assert "mixture code 75% web 25%" in found["code"]
    assert "mixture code 50% web 50%" in found["even"]
    shown, _ = legend(tmp_path, group(read_runs(tmp_path)))
    assert "mixture code 75% web 25%" in shown[0] and "mixture code 50% web 50%" in shown[1]
    assert "mixture" not in shown[2]


def test_keys_with_the_same_last_part_are_told_apart(tmp_path):
    for every in (1, 2):
        overrides = {"model.moe.every": every, "eval.every": every}
        write_run(tmp_path / f"{every}", config(**overrides), FINISHED)
    assert labels(read_runs(tmp_path))["2"] == "moe.every=2 eval.every=2"


def test_rates_have_a_log_axis(tmp_path):
    """Even if the largest is less than eight times the smallest."""
    for rate in (1e-3, 3e-3):
        write_run(tmp_path / f"{rate}", config(**{"optimizer.learning_rate": rate}), FINISHED)
    found = group(read_runs(tmp_path))
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        write_plot(tmp_path / "plot.svg", found, "optimizer.learning_rate")
    assert "10^{-3}" in (tmp_path / "plot.svg").read_text()  # matplotlib's comment on a tick
