"""Results of hand-made workdirs, against numbers computed by hand."""

import csv
import json
import math
from pathlib import Path

import pytest
from made_runs import FINISHED, config, train_row, write_run

from moe_jax.cli.results import main
from moe_jax.errors import UserError
from moe_jax.tools.results.group import group, labels, ranks, sample_fault
from moe_jax.tools.results.plot import write_plot
from moe_jax.tools.results.read import DONE, read_runs
from moe_jax.tools.results.table import groups_table, runs_table

V, L, D, H, A, F, E, K, T, B = 258, 2, 32, 2, 16, 64, 8, 2, 32, 32
ATTENTION = 4 * D * H * A
DENSE = 2 * V * D + L * (ATTENTION + 2 * D + 3 * D * F) + D
SPARSE = DENSE + D * E + E * 3 * D * 32 - 3 * D * F  # the second layer's FFN becomes 8 experts
SPARSE_ACTIVE = SPARSE - (E - K) * 3 * D * 32


def test_numbers_of_one_run(tmp_path):
    write_run(tmp_path / "a", config(), FINISHED)
    (run,) = read_runs(tmp_path)
    assert (run.name, run.state) == ("a", DONE)
    assert (run.best_heldout, run.train_loss) == (2.5, 2.0)
    assert (run.tokens_per_second, run.drop_fraction) == (90.0, 0.25)
    assert (run.parameters, run.active) == (SPARSE, SPARSE_ACTIVE)
    matmul = V * D + L * ATTENTION + 3 * D * F + D * E + K * 3 * D * 32
    assert run.flops_per_token == 6 * (matmul + L * T * H * A)
    assert run.flops == run.flops_per_token * 8 * B * T
    assert run.curve == ((run.flops / 2, 2.5), (run.flops, 2.75))


def test_a_dense_run_and_a_run_that_is_the_folder_itself(tmp_path):
    write_run(tmp_path / "a", config(model__dense=True), FINISHED)
    (run,) = read_runs(tmp_path / "a")
    assert (run.name, run.state) == (".", DONE)
    assert run.parameters == run.active == DENSE


def test_what_is_missing_or_broken_is_the_runs_state(tmp_path):
    write_run(tmp_path / "empty metrics", config(), [])
    write_run(tmp_path / "half", config(), FINISHED[:3], tail='{"step": 5, "lo')  # killed
    write_run(tmp_path / "holes", config(), FINISHED, tail='no json\n{"step": "x"}\n')
    write_run(tmp_path / "nan", config(), [*FINISHED[:3], {"step": 5, "loss": "nan"}])
    steep = {"step": 3, "loss": 2.0, "grad_norm": "inf"}
    write_run(tmp_path / "steep", config(), [*FINISHED[:1], steep])
    write_run(tmp_path / "no config", None, FINISHED)
    write_run(tmp_path / "no metrics", config(), None)
    write_run(tmp_path / "torn config", None, FINISHED)
    (tmp_path / "torn config" / "config.json").write_text('{"seed": ')
    (tmp_path / "sweep.json").write_text('{"never": {}, "half": {}}')
    states = {run.name: run.state for run in read_runs(tmp_path)}
    assert list(states)[:2] == ["never", "half"]  # the sweep's order comes first
    reason = states.pop("torn config")
    assert reason.startswith("config.json is damaged (Expecting value at character 9)")
    assert states == {
        "never": "not started",
        "empty metrics": "step 0 of 8",
        "half": "step 4 of 8",
        "holes": "metrics.jsonl: 2 broken lines",
        "nan": "diverged at step 5",
        "steep": "diverged at step 3",
        "no config": "no config.json",
        "no metrics": "no metrics.jsonl",
    }


def test_the_command_never_fails_for_a_damaged_run(tmp_path, capsys):
    write_run(tmp_path / "good", config(), FINISHED)
    write_run(tmp_path / "bytes", None, None)
    (tmp_path / "bytes" / "config.json").write_bytes(b"\xff\xfe")
    write_run(tmp_path / "list", config(), None)
    (tmp_path / "list" / "metrics.jsonl").write_text('[1]\n{"step": 8, "eval_loss": "high"}\n3\n')
    write_run(tmp_path / "old", None, FINISHED)
    (tmp_path / "old" / "config.json").write_text('{"gone": 1}')
    (tmp_path / "sweep.json").write_text("[")
    assert main(["moe-results", f"--workdir={tmp_path}", f"--csv={tmp_path / 'all.csv'}"]) == 0
    out = capsys.readouterr().out
    for name in ("good", "bytes", "list", "old"):
        assert f"| {name} " in out
    rows = list(csv.DictReader((tmp_path / "all.csv").open()))
    assert {row["run"]: row["best_heldout"] for row in rows} == {
        "good": "2.5",
        "bytes": "",
        "list": "",
        "old": "",
    }


def seeds(tmp_path: Path) -> None:
    """Write dense runs of seeds 0 to 2 (best 2.0, 2.2, 2.4), and two MoE runs, one unfinished."""
    for seed, best in enumerate((2.0, 2.2, 2.4)):
        rows = [train_row(8, best), {"step": 4, "eval_loss": 3.0}, {"step": 8, "eval_loss": best}]
        write_run(tmp_path / f"dense{seed}", config(model__dense=True, seed=seed), rows)
    write_run(tmp_path / "moe0", config(), FINISHED)
    write_run(tmp_path / "moe1", config(seed=1), FINISHED[:3])


def test_seeds_become_means_and_deviations(tmp_path):
    seeds(tmp_path)
    results = read_runs(tmp_path)
    dense, sparse = group(results)
    assert [run.name for run in dense.runs] == ["dense0", "dense1", "dense2"]
    assert [run.name for run in sparse.runs] == ["moe0"]
    assert dense.spread("best_heldout") == pytest.approx((2.2, 0.2))  # n - 1
    assert sparse.spread("best_heldout") == (2.5, None)
    assert dense.label() == "dense"
    table = groups_table([dense, sparse]).splitlines()
    assert [cell.strip() for cell in table[2].split("|")[1:5]] == [
        "dense",
        "1",
        "3",
        "2.2000 ± 0.2000",
    ]
    assert [cell.strip() for cell in table[3].split("|")[2:5]] == ["2", "1", "2.5000"]
    assert "| step 4 of 8 |" in runs_table(results)


def held_out(step: int, loss: float, rows: int = 64, tokens: int | None = None) -> dict:
    return {
        "step": step,
        "eval_loss": loss,
        "eval_loss_nodrop": loss - 0.125,
        "eval_rows": rows,
        "eval_tokens": rows * T if tokens is None else tokens,
    }


def evaluated(folder: Path, *held: dict, text: str = "aa", **overrides: object) -> None:
    """Write a finished run with these held-out rows, on a store of this fingerprint."""
    write_run(folder, config(**overrides), [train_row(8, 2.0), *held])
    (folder / "data.json").write_text(json.dumps({"fingerprint": text}))


def test_the_sample_and_the_loss_without_drops_have_columns(tmp_path, capsys):
    evaluated(tmp_path / "a", held_out(4, 2.5), held_out(8, 2.75))
    (run,) = read_runs(tmp_path)
    assert (run.heldout_rows, run.best_heldout, run.best_nodrop) == (64, 2.5, 2.375)
    assert main(["moe-results", f"--workdir={tmp_path}", f"--csv={tmp_path / 'all.csv'}"]) == 0
    heading, _, cells = capsys.readouterr().out.splitlines()[:3]
    shown = dict(zip(*[[c.strip() for c in s.split("|")] for s in (heading, cells)], strict=True))
    assert shown["held-out rows"] == "64" and shown["without drops"] == "2.3750"
    (row,) = csv.DictReader((tmp_path / "all.csv").open())
    assert (row["heldout_rows"], row["best_nodrop"]) == ("64", "2.375")


def test_a_best_loss_is_one_of_the_newest_sample(tmp_path):
    """eval.rows was changed on resume, so the earlier, lower loss is of a different sample."""
    evaluated(tmp_path / "a", held_out(2, 1.0, rows=8), held_out(4, 2.5), held_out(8, 2.75))
    (run,) = read_runs(tmp_path)
    assert (run.heldout_rows, run.best_heldout, run.best_nodrop) == (64, 2.5, 2.375)
    assert [loss for _, loss in run.curve] == [2.5, 2.75]


RANKED = {"eval.rows": 64, "model.moe.num_experts": 8}


@pytest.mark.parametrize(
    ("other", "overrides", "differs"),
    [
        ({}, {}, ""),
        pytest.param({"rows": 32}, {"eval.rows": 32}, "size", marks=pytest.mark.lifecycle),
        ({"tokens": 64 * T - 5}, {}, "size"),
        ({"text": "bb"}, {}, "text or tokenizer"),
        # The same number of targets in rows of a different length: a different sample.
        ({"rows": 32, "tokens": 64 * T}, {"eval.rows": 32, "data.sequence_length": 64}, "length"),
        # The whole split in rows of a different length: the same targets.
        pytest.param(
            {"rows": 32, "tokens": 64 * T, "whole": True},
            {"data.sequence_length": 64},
            "",
            marks=pytest.mark.lifecycle,
        ),
        # The whole split, whether eval.rows equals its number of rows or is larger.
        ({}, {"eval.rows": 512}, ""),
    ],
)
def test_losses_on_different_samples_are_listed_but_not_ranked(
    tmp_path, other, overrides, differs, capsys
):
    other = dict(other)
    whole, text = other.pop("whole", False), other.pop("text", "aa")
    base = RANKED | ({"eval.rows": 0} if whole else {})
    evaluated(tmp_path / "a", held_out(8, 2.5), **base | {"model.moe.num_experts": 4})
    evaluated(tmp_path / "b", held_out(8, 2.25, **other), text=text, **base | overrides)
    groups = group(read_runs(tmp_path))
    fault = sample_fault(groups)
    assert ranks(groups) == ([None, None] if differs else [2, 1])
    assert bool(fault) == bool(differs) and differs in fault
    arguments = ["moe-results", f"--workdir={tmp_path}"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "| a " in out and "| b " in out and (fault in out)
    assert main([*arguments, f"--plot={tmp_path / 'plot.svg'}"]) == 0
    plot = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert ("<!-- DIFFERENT held-out samples: do not rank them" in plot) == bool(differs)
    if differs:
        assert "not ranked" in fault and " in a; " in fault and " in b)" in fault


def test_seeds_on_different_samples_are_not_averaged(tmp_path):
    """The configs differ only in the seed, but the data changed between the runs."""
    evaluated(tmp_path / "a", held_out(8, 2.0), seed=0)
    evaluated(tmp_path / "b", held_out(8, 3.0), seed=1, text="bb")
    groups = group(read_runs(tmp_path))
    assert [[run.name for run in each.runs] for each in groups] == [["a"], ["b"]]
    assert "aa" not in sample_fault(groups) and "text" in sample_fault(groups)


@pytest.mark.parametrize("record", ["[]", "7", '{"fingerprint": [1]}', "{", '"x"', "\xff"])
def test_a_broken_record_of_the_text_is_no_text(tmp_path, record):
    evaluated(tmp_path / "a", held_out(8, 2.0))
    (tmp_path / "a" / "data.json").write_bytes(record.encode("latin-1"))
    (run,) = read_runs(tmp_path)
    assert run.state == DONE and run.sample is not None and run.sample.text == ""


REFUSED = {"skipped": 1}


@pytest.mark.parametrize(
    ("rows", "state", "train_loss"),
    [
        # The last step of a finished run was skipped: not finite, or a spike.
        ([train_row(7, 2.0), train_row(8, math.nan) | REFUSED, held_out(8, 2.5)], DONE, 2.0),
        ([train_row(7, 2.0), train_row(8, 9e9) | REFUSED, held_out(8, 2.5)], DONE, 2.0),
        # Stopped during skipped steps: the run can continue.
        ([train_row(4, 2.0), train_row(5, math.nan) | REFUSED], "step 5 of 8", 2.0),
        (
            [train_row(4, 2.0), *[train_row(s, 9e9) | REFUSED for s in (5, 6, 7)]],
            "step 7 of 8",
            2.0,
        ),
        # One more skipped step than train.max_skipped (3), finite or not; no step was accepted.
        (
            [train_row(1, 2.0), *[train_row(s, 9e9) | REFUSED for s in (2, 3, 4, 5)]],
            "diverged at step 5",
            2.0,
        ),
        ([train_row(s, math.nan) | REFUSED for s in (1, 2, 3, 4)], "diverged at step 4", None),
        # Steps were accepted later, beyond the end of an earlier train.steps.
        (
            [train_row(4, 9e9) | REFUSED, train_row(5, 2.5) | {"skipped": 0}],
            "step 5 of 8",
            2.5,
        ),
    ],
)
def test_refused_steps_are_no_end_and_no_loss(tmp_path, rows, state, train_loss):
    written = [{k: str(v) if v != v else v for k, v in row.items()} for row in rows]
    write_run(tmp_path / "a", config(), written)
    (run,) = read_runs(tmp_path)
    assert (run.state, run.train_loss) == (state, train_loss)


def test_labels_say_what_differs(tmp_path):
    for experts in (4, 8):
        overrides = {"model.moe.num_experts": experts}
        write_run(tmp_path / f"moe{experts}", config(**overrides), FINISHED)
    write_run(tmp_path / "dense", config(model__dense=True), FINISHED)
    write_run(tmp_path / "damaged", None, FINISHED)
    found = labels(read_runs(tmp_path))
    assert found == {"moe4": "num_experts=4", "moe8": "num_experts=8", "dense": "dense"}


def test_one_configuration_is_called_base(tmp_path):
    write_run(tmp_path / "a", config(), FINISHED)
    assert group(read_runs(tmp_path))[0].label() == "base"


def rates(tmp_path: Path) -> None:
    for rate in (1e-3, 1e-2):
        for dense in (False, True):
            overrides = {"optimizer.learning_rate": rate, "model.dense": dense}
            write_run(tmp_path / f"{rate}{dense}", config(**overrides), FINISHED)


@pytest.mark.parametrize("x", ["", "--x=optimizer.learning_rate"])
def test_plots_are_written(tmp_path, x, capsys):
    rates(tmp_path)
    plot = tmp_path / "plot.png"
    assert main(["moe-results", f"--workdir={tmp_path}", f"--plot={plot}", *filter(None, [x])]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 10_000
    capsys.readouterr()


def test_a_plot_shows_the_means_of_seeds(tmp_path):
    """Labels and title are read from the text of the SVG; pixels are not compared."""
    seeds(tmp_path)
    groups = group(read_runs(tmp_path))
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        write_plot(tmp_path / "plot.svg", groups)
    text = (tmp_path / "plot.svg").read_text()
    assert "held-out loss (nats per token)" in text and "training compute (model FLOPs)" in text
    assert "2 configurations, means over 1 to 3 seeds" in text
    assert "configuration (parameters)" in text and f"1  dense  ({DENSE / 1e3:.2f}k)" in text


@pytest.mark.parametrize("x", ["model.dense.more", "train.steps", "data.files"])
def test_x_names_a_varied_number(tmp_path, x):
    rates(tmp_path)
    with pytest.raises(UserError, match=r"use one of model\.dense, optimizer\.learning_rate"):
        write_plot(tmp_path / "p.png", group(read_runs(tmp_path)), x)


def test_mistakes_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="has no runs"):
        main(["moe-results", f"--workdir={tmp_path}"])
    with pytest.raises(UserError, match="is not a folder"):
        main(["moe-results", f"--workdir={tmp_path / 'none'}"])
    write_run(tmp_path / "a", config(), FINISHED[:1])
    with pytest.raises(UserError, match="no run is finished"):
        main(["moe-results", f"--workdir={tmp_path}", f"--plot={tmp_path / 'p.png'}"])
    with pytest.raises(UserError, match="cannot be written"):
        main(["moe-results", f"--workdir={tmp_path}", f"--csv={tmp_path / 'no' / 'a.csv'}"])
