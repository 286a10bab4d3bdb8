"""The pages' own commands, run in their order on a small model and a small text."""

import re
import shlex

import pytest
from small_run import ONE_LAYER, SMALL, write_corpus
from test_quoted_output import shape
from test_readme import README, ROOT, typed_in_order

COMMANDS = typed_in_order()
# `runs/sizes` holds runs of an hour.  tests/tools/test_results_compare.py and test_results_fit.py
# run these commands on recorded runs.
LINES = [
    line
    for line in COMMANDS
    if line.startswith("python -m moe_jax ") and "--workdir=runs/sizes" not in line
]
# The groups are those that tiny itself has.
SMALLER = ONE_LAYER | {"eval.samples": 0, "model.moe.group_rows": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands are typed: configs beside it, text of each kind in it."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    write_corpus(folder / "path")
    for number in range(64):
        text = (folder / "path" / f"{number:03d}.txt").read_text().strip()
        (folder / "path" / f"{number:03d}.jsonl").write_text(f'{{"text": "{text}"}}\n')
    return folder


def typed(line: str, folder, more_steps: int) -> list[str]:
    """The arguments after `python -m`, shrunk: what a page sets itself stays."""
    words = [word.replace("/path/", f"{folder}/path/") for word in shlex.split(line)[2:]]
    if words[:2] in (["moe_jax", "checkpoint"], ["moe_jax", "goodput"]):
        return words
    if words[:2] == ["moe_jax", "results"]:  # of a sweep that this test does not run
        return [word.replace("runs/dense", "runs/tiny") for word in words]
    text = {"data.source": "text", "data.files": f"{folder}/path/*.txt"}
    small = SMALL | SMALLER | text | {"train.steps": more_steps, "model.moe.num_experts": 8}
    given = {word.split("=")[0].removeprefix("--config.") for word in words}
    kept = {key: value for key, value in small.items() if key not in given}
    words = [w.replace("--vocab_size=4096", "--vocab_size=300") for w in words]
    words = [
        f"--config.train.steps={more_steps}" if w.startswith("--config.train.steps=") else w
        for w in words
    ]
    return [*words, *(f"--config.{key}={value}" for key, value in kept.items())]


def without_eta(line: str) -> str:
    """A log line without its numbers and the time that is left."""
    return shape(line.partition("  eta ")[0])


@pytest.mark.lifecycle
def test_commands_in_order(folder, run_cli):
    """Later commands go on from what earlier ones left, as a reader would."""
    assert len(LINES) >= 7
    first = "python -m moe_jax train --config=configs/tiny.py --workdir=runs/tiny"
    for number, line in enumerate([first, *LINES]):
        done = run_cli(typed(line, folder, 2 + number), cwd=folder)
        assert done.code == 0, f"{line}\n{done.err}"
        if number == 0:  # the README shows its log
            said = {without_eta(text) for text in done.out.splitlines()}
            shown = re.findall(r"^step \d.*$", README, re.MULTILINE)
            assert shown and {without_eta(text) for text in shown} <= said
    for name in ("tiny", "experts", "text", "jsonl", "bpe"):
        assert (folder / "runs" / name / "metrics.jsonl").exists(), name


@pytest.mark.lifecycle  # by default, tests/launch/test_runs.py checks the runs of every sweep
@pytest.mark.parametrize("line", [line for line in COMMANDS if "launch.sweep " in line])
def test_sweeps_hold_only_good_runs(folder, run_cli, line):
    done = run_cli([*shlex.split(line)[2:], "--dry_run"], cwd=folder)
    assert done.code == 0, done.err
    assert "+ " in done.out


@pytest.mark.parametrize("line", [line for line in COMMANDS if " --dry_run " in line])
def test_launchers_print_what_they_would_run(run_cli, line):
    done = run_cli(shlex.split(line)[2:])
    assert (done.code, done.err) == (0, "")
    assert shlex.split(line)[-1] in done.out  # the trainer's last argument
