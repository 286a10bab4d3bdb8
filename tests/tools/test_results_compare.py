"""Speed-ups against a baseline, of hand-made workdirs, against numbers computed by hand."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from made_runs import config, train_row, write_run
from small_run import ONE_LAYER

from moe_jax.cli.results import main
from moe_jax.errors import UserError
from moe_jax.tools.results.compare import Crossing, compare, reach, seconds_until, with_baseline
from moe_jax.tools.results.compare_plot import write_compare_plot
from moe_jax.tools.results.read import read_runs

T, B, STEPS = 32, 32, 8
DENSE = (6.0, 4.0, 3.0, 2.0)  # held-out losses at steps 2, 4, 6 and 8


def held_out(folder: Path, losses: Sequence[float], seconds: float = 1.0, **overrides) -> None:
    """Write a run with an evaluation every two steps and the same time for every step."""
    text = overrides.pop("text", "aa")
    rows: list[dict] = []
    for step, loss in zip(range(2, 2 * len(losses) + 1, 2), losses, strict=True):
        rows.append(train_row(step, loss) | {"step_seconds": seconds})
        rows.append({"step": step, "eval_loss": loss, "eval_rows": 64, "eval_tokens": 64 * T})
    write_run(folder, config(**{"eval.rows": 64} | ONE_LAYER | overrides), rows)
    (folder / "data.json").write_text(json.dumps({"fingerprint": text}))


def dense(folder: Path, losses: Sequence[float] = DENSE, **overrides) -> None:
    held_out(folder, losses, model__dense=True, **overrides)


def compared(tmp_path: Path, baseline: str = "dense"):
    results, name = with_baseline(read_runs(tmp_path), tmp_path, tmp_path / baseline)
    return compare(results, name)


@pytest.mark.parametrize(
    ("curve", "crossing"),
    [
        ([(2, 6.0), (4, 3.0), (6, 1.0)], Crossing(5.0, False)),
        ([(2, 6.0), (4, 2.0), (6, 1.0)], Crossing(4.0, False)),
        # Below the loss at step 4, but not from there to the end.
        ([(2, 6.0), (4, 1.5), (6, 3.0), (8, 1.0)], Crossing(7.0, False)),
        ([(2, 6.0), (4, 1.0), (6, 2.5)], None),
        ([(2, 1.0), (4, 1.0)], Crossing(2.0, True)),
        ([(2, 6.0), (4, 2.0)], Crossing(4.0, False)),  # exactly the loss, at the end
    ],
)
def test_a_curve_reaches_a_loss_if_it_stays_there_to_its_end(curve, crossing):
    assert reach(curve, 2.0) == crossing


def test_speed_ups_by_hand(tmp_path):
    """L* = 2 is reached halfway between steps 4 and 6; each step takes twice as long."""
    dense(tmp_path / "dense")
    held_out(tmp_path / "moe", (5.0, 3.0, 1.0, 0.5), seconds=2.0)
    whole = compared(tmp_path)
    assert (whole.loss, whole.steps, whole.seconds) == (2.0, STEPS, 8.0)
    base, moe = read_runs(tmp_path)
    assert whole.flops == base.flops == base.flops_per_token * STEPS * B * T
    [row] = whole.others
    [speed] = row.speeds
    assert speed.crossing == Crossing(5.0, False)
    assert speed.steps == 8 / 5
    assert speed.flops == pytest.approx(8 * base.flops_per_token / (5 * moe.flops_per_token))
    assert speed.seconds == pytest.approx(8 / 10)


def test_the_baseline_is_the_mean_of_its_seeds_and_may_lie_elsewhere(tmp_path):
    below = tmp_path / "runs"
    dense(tmp_path / "elsewhere", seed=3)
    dense(below / "twin", (6.0, 4.0, 3.0, 2.5), seed=4, seconds=2.0)
    for seed, end in enumerate((1.0, 2.0, 2.5)):
        held_out(below / f"moe{seed}", (5.0, 4.0, 3.0, end), seed=seed)
    whole = compared(below, "../elsewhere")
    assert {run.name for run in whole.baseline.runs} == {"twin", str(below / "../elsewhere")}
    assert (whole.loss, whole.seconds) == (2.25, 12.0)
    [row] = whole.others
    crossings = [speed.crossing and speed.crossing.step for speed in row.speeds]
    assert crossings == [6 + 2 * 0.75 / 2, 6 + 2 * 0.75, None]
    assert row.spread("steps") is None
    assert row.speeds[2].above == 0.25


def test_step_times_are_summed_until_the_step(tmp_path):
    """A row's time holds for the steps since the row before."""
    rows = [train_row(s, 2.0) | {"step_seconds": t} for s, t in ((1, 5.0), (4, 1.0), (8, 2.0))]
    write_run(tmp_path / "a", config(), [*rows, {"step": 8, "eval_loss": 2.0}])
    [run] = read_runs(tmp_path)
    assert run.seconds == ((1, 5.0), (4, 8.0), (8, 16.0))
    assert [seconds_until(run, step) for step in (0, 0.5, 1, 2, 8, 9)] == [0, 2.5, 5, 6, 16, None]


def shown(tmp_path: Path, capsys, *more: str) -> str:
    assert (
        main(["moe-results", f"--workdir={tmp_path}", f"--compare={tmp_path / 'dense'}", *more])
        == 0
    )
    return capsys.readouterr().out


def cells(out: str, config_: str) -> list[str]:
    [line] = [line for line in out.splitlines() if line.startswith(f"| {config_} ")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_and_its_notes(tmp_path, capsys):
    dense(tmp_path / "dense")
    for seed, end in enumerate((0.5, 1.0)):
        overrides = {"model.moe.num_experts": 4, "seed": seed}
        held_out(tmp_path / f"four{seed}", (5.0, 3.0, end, end), **overrides)
    sixteen = {"model.moe.num_experts": 16, "optimizer.schedule": "constant"}
    held_out(tmp_path / "sixteen", (5.0, 3.0, 2.5, 2.125), **sixteen)
    held_out(tmp_path / "late", (1.5, 1.0, 1.0, 1.0), **{"model.moe.num_experts": 2})
    out = shown(tmp_path, capsys)
    assert "baseline dense schedule=cosine: L* = 2.0000, the final held-out loss (nats" in out
    assert "after 8 steps" in out and "and 8.0s of training" in out
    four = cells(out, "num_experts=4 schedule=cosine")
    assert four[1:5] == ["2", "0.7500 ± 0.3536", "5 ± 0", "1.63 ± 0.05"]
    sixteen_cells = cells(out, "num_experts=16 schedule=constant")
    assert sixteen_cells[3:] == ["not reached, 0.1250 above", "-", "-", "-"]
    late = cells(out, "num_experts=2 schedule=cosine")
    assert late[3:5] == ["≤ 2", "≥ 4.00"] and late[6] == "≥ 4.00"
    assert "has not decayed there, so its speed-up is underestimated" in out
    assert "no decay to a last step: sixteen (constant)" in out
    assert "Tokens per step" not in out


def test_runs_without_step_times_have_no_speed_up_in_time(tmp_path, capsys):
    dense(tmp_path / "dense")
    rows = [
        train_row(8, 1.0),
        {"step": 2, "eval_loss": 1.5, "eval_rows": 64, "eval_tokens": 64 * T},
    ]
    rows.append(rows[1] | {"step": 8})
    write_run(tmp_path / "old", config(**{"eval.rows": 64} | ONE_LAYER), rows)
    (tmp_path / "old" / "data.json").write_text('{"fingerprint": "aa"}')
    base, old = (run.flops_per_token or 0.0 for run in read_runs(tmp_path))
    found = cells(shown(tmp_path, capsys), "dense=False")[4:]
    assert found == ["≥ 4.00", f"≥ {4 * base / old:.2f}", "-"]


def test_runs_that_cannot_be_compared_are_left_out_by_name(tmp_path, capsys):
    dense(tmp_path / "dense")
    held_out(tmp_path / "good", (5.0, 3.0, 1.0, 0.5), **{"train.batch_size": 64})
    held_out(tmp_path / "half", (5.0, 3.0, 1.0))
    held_out(tmp_path / "text", (5.0, 3.0, 1.0, 0.5), text="bb")
    held_out(tmp_path / "short", (5.0, 3.0, 1.0), **{"data.max_epochs": 1})
    with (tmp_path / "short" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "eval_loss": 1.0, "max_epochs": 1}) + "\n")
    write_run(tmp_path / "torn", None, [])
    out = shown(tmp_path, capsys)
    assert len(re.findall(r"^\| \w", out, re.MULTILINE)) == 2  # the heading, and `good`
    assert "half left out: it is not finished (step 6 of 8), so its learning rate has not" in out
    assert "short left out: it ended at step 6 of 8 (data.max_epochs), before" in out
    assert "text left out: the runs were evaluated on different samples" in out
    assert "torn left out: it has no config" in out
    assert "Tokens per step differ between these runs" in out
    assert "good left out" not in out


NAN = {"step": 8, "eval_loss": "nan"}


REFUSED = {
    "none": "is not a folder: name",
    "empty": "is not a run (no config.json): name",
    "torn": "is not a run (no config.json): name",
    "silent": "has no held-out loss: set eval.rows",
    "half": "is not finished (step 6 of 8), so its learning rate has not decayed",
    "nan": "has no finite held-out loss at its last step, 8",
}


def test_a_baseline_without_a_final_loss_is_refused(tmp_path):
    held_out(tmp_path / "moe", DENSE)
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "torn", None, [])
    write_run(tmp_path / "silent", config(seed=7, **ONE_LAYER), [train_row(8, 2.0)])
    dense(tmp_path / "half", DENSE[:3])
    dense(tmp_path / "nan", DENSE[:3], seed=9)
    with (tmp_path / "nan" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(NAN | {"eval_rows": 64, "eval_tokens": 64 * T}) + "\n")
    results = read_runs(tmp_path)
    for baseline, why in REFUSED.items():
        with pytest.raises(UserError, match=f"^--compare=.*{re.escape(why)}[^\n]*$"):
            compare(*with_baseline(results, tmp_path, tmp_path / baseline))


def test_a_baseline_alone_is_refused(tmp_path):
    dense(tmp_path / "dense")
    dense(tmp_path / "twin", seed=1)
    with pytest.raises(UserError, match="has nothing to compare with: set --workdir to"):
        compared(tmp_path)
    held_out(tmp_path / "half", DENSE[:2])
    with pytest.raises(UserError, match=r"nothing to compare with: half left out: it is not"):
        compared(tmp_path)


@pytest.mark.parametrize(
    ("more", "why"),
    [(["--fit=clark"], "two reports"), (["--x=train.steps"], "without --compare and --fit")],
)
def test_flags_that_exclude_each_other(tmp_path, more, why):
    with pytest.raises(UserError, match=why):
        main(["moe-results", f"--workdir={tmp_path}", f"--compare={tmp_path}", *more])


def test_the_plot_shows_both_axes_and_the_final_loss(tmp_path, monkeypatch):
    dense(tmp_path / "dense")
    dense(tmp_path / "twin", (6.0, 4.0, 3.0, 2.5), seed=1, seconds=3.0)
    losses = [30.0, 3.0, 2.9, 2.8, 2.5, 2.0, 1.0, 0.5]
    held_out(tmp_path / "moe", losses, seconds=120.0, **{"train.steps": 16})
    figures = []
    monkeypatch.setattr(
        "moe_jax.tools.results.compare_plot.save_figure", lambda *given: figures.append(given)
    )
    write_compare_plot(tmp_path / "plot.png", compared(tmp_path))
    [(figure, path)] = figures
    assert path == tmp_path / "plot.png"
    lines = [
        {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
        for axes in figure.axes
    ]
    base, moe, final = "dense steps=8 (baseline)", "steps=16", "L* = 2.2500"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [base, moe, final]
    steps, times = lines
    assert steps[base] == ([2, 4, 6, 8], [6.0, 4.0, 3.0, 2.25])
    assert times[base][0] == pytest.approx([step * 2 / 60 for step in (2, 4, 6, 8)])
    assert times[moe] == (list(range(4, 36, 4)), losses)
    assert steps[final][1] == times[final][1] == [2.25, 2.25]
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels == ["steps", "training time (minutes, without evaluations and saves)"]
    low, high = figure.axes[0].get_ylim()
    assert low < 0.5 and 6.0 < high < 7.0  # not 30, a loss of the first fifth


def test_the_plot_is_written(tmp_path, capsys):
    dense(tmp_path / "dense")
    held_out(tmp_path / "moe", (5.0, 3.0, 1.0, 0.5))
    shown(tmp_path, capsys, f"--plot={tmp_path / 'plot.png'}")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
