"""Output that the pages quote is what the commands print.

A quoted block begins with `$ COMMAND`; a line of `...` stands for lines that are left out.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence

import pytest
from test_readme import PAGES, ROOT

from moe_jax.tools.doctor.checks import CHECKS

FILES = ROOT / "tests" / "files"
LEDGER = FILES / "quoted_ledger.jsonl"  # of the run of configs/tiny.py that docs/routers.md shows


def quoted() -> dict[str, list[str]]:
    """Command -> the lines quoted below it, of all pages."""
    blocks = {}
    for page in PAGES:
        for command, lines in re.findall(
            r"```\n\$ ([^\n]*)\n(.*?)```", page.read_text(), re.DOTALL
        ):
            blocks[command] = lines.splitlines()
    return blocks


def assert_printed(lines: Sequence[str], printed: str) -> None:
    """Every line is printed, in this order; lines next to each other without `...` between."""
    rest, gap = printed.splitlines(), True
    for line in lines:
        if line == "...":
            gap = True
            continue
        assert line in rest, f"not printed, or not in this order: {line!r}"
        skipped = rest.index(line)
        assert gap or not skipped, f"lines are left out before {line!r}: write ..."
        rest, gap = rest[skipped + 1 :], False


def shape(line: str) -> str:
    """The words of a line without its numbers."""
    return re.sub(r"\d[\d.,]*[a-zA-Z]*", "#", line)


def arguments(command: str) -> list[str]:
    assert command.startswith("python -m ")
    return command.removeprefix("python -m ").split()


PLAN, DOCTOR, SHOW = "moe_jax plan ", "moe_jax doctor ", "moe_jax ledger "


def the_one(start: str) -> tuple[str, list[str]]:
    [found] = [item for item in quoted().items() if item[0].startswith(f"python -m {start}")]
    return found


def test_every_quoted_command_is_checked_here():
    starts = tuple(f"python -m {start}" for start in (PLAN, DOCTOR, SHOW))
    assert [command for command in quoted() if not command.startswith(starts)] == []


def test_plan(run_cli):
    """Analytic figures: the same on every machine."""
    command, lines = the_one(PLAN)
    done = run_cli(arguments(command), cwd=ROOT)
    assert done.code == 0, done.err
    assert_printed(lines, done.out)


def test_ledger(run_cli, tmp_path):
    """The counts of a run that was kept, printed again."""
    command, lines = the_one(SHOW)
    folder = re.search(r"--workdir=(\S+)", command)
    assert folder is not None
    workdir = tmp_path / folder[1]
    workdir.mkdir(parents=True)
    shutil.copy(LEDGER, workdir / "ledger.jsonl")
    done = run_cli(arguments(command), cwd=tmp_path)
    assert done.code == 0, done.err
    assert_printed(lines, done.out)


def test_doctor_names_its_checks():
    """Figures differ from machine to machine; the names and the number of checks do not."""
    _, lines = the_one(DOCTOR)
    width = max(map(len, CHECKS))
    named = [line[6 : 6 + width].strip() for line in lines if line.startswith("ok    ")]
    assert named and [name for name in CHECKS if name in named] == named
    assert lines[-1].startswith(f"{len(CHECKS)} checks, 0 failed, ")
    page = (ROOT / "docs/doctor.md").read_text().partition("\n## ")[0]
    table = re.findall(r"^\| ([^|]+) \| ", page, re.MULTILINE)
    assert table[1:] == list(CHECKS)


@pytest.mark.full
@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_scaling_tables(run_cli, dispatch):
    """docs/scaling.md has the numbers that the planner prints."""
    page = (ROOT / "docs/scaling.md").read_text().partition(f"## `{dispatch}`")[2]
    table = page.partition("\n## ")[0]
    config = ["--config=configs/mixtral_8x7b.py", f"--config.model.moe.dispatch={dispatch}"]
    command = ["moe_jax", "plan", *config, "--topology=v5p:2x2x2", "--scaling"]
    done = run_cli(command, cwd=ROOT, timeout=600)
    assert done.code == 0, done.err
    assert numbers(table) == numbers(done.out) != []


def numbers(table: str) -> list[list[str]]:
    """What has a digit in each row of a table whose first cell is a number of chips."""
    rows = [line for line in table.splitlines() if re.match(r"\| [\d,]+ \|", line)]
    return [re.findall(r"[\w=,.%-]*\d[\w=,.%-]*", row) for row in rows]


def test_supervisor_says_its_restarts_in_the_quoted_form(tmp_path):
    """One restart of a command that dies by SIGKILL."""
    page = (ROOT / "docs/cluster.md").read_text()
    [line] = re.findall(r"^\S+ restart \d.*$", page, re.MULTILINE)
    dies = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    options = ["--max_stuck=1", "--wait=0", f"--workdir={tmp_path}"]
    supervise = [sys.executable, "-m", "launch.supervise", *options, "--", *dies]
    done = subprocess.run(supervise, cwd=ROOT, capture_output=True, text=True, timeout=120)
    printed = [shape(text).partition(" ")[2] for text in done.stdout.splitlines()]
    assert shape(line).partition(" ")[2] in printed, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("lines", "printed", "well"),
    [
        (["a", "c"], "a\nb\nc", False),
        (["a", "...", "c"], "a\nb\nc", True),
        (["c", "...", "a"], "a\nb\nc", False),
        (["b", "c"], "a\nb\nc", True),
    ],
)
def test_lines_that_are_left_out_are_marked(lines, printed, well):
    if well:
        assert_printed(lines, printed)
    else:
        with pytest.raises(AssertionError):
            assert_printed(lines, printed)
