"""Goodput: the categories sum to the whole time for any content of the file."""

import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.cli.goodput import main
from moe_jax.errors import UserError
from moe_jax.tools.goodput.account import CATEGORIES, account
from moe_jax.tools.goodput.plot import write_plot
from moe_jax.tools.goodput.show import apportion, report
from moe_jax.watch.timekeeper import GOODPUT

DAY = 1.7e9  # a moment, in seconds since 1970


def line(attempt, began, time, start=0, reached=0, end=None, /, **seconds):
    row = {
        "attempt": attempt,
        "began": DAY + began,
        "time": DAY + time,
        "from": start,
        "step": reached,
        "seconds": seconds,
    }
    return json.dumps(row if end is None else row | {"end": end}).encode()


# Killed at 100 s after 40 steps, of which 30 are in a checkpoint; restarted after 20 s; stopped by
# request; started again 5 s later and killed.
STORY = [
    line("a", 0, 10, 0, 0, init=10),
    line("a", 0, 50, 0, 10, init=10, compile=20, step=20),
    line("a", 0, 90, 0, 30, init=10, compile=20, step=50, checkpoint=8, data=2),
    line("a", 0, 100, 0, 40, init=10, compile=20, step=60, checkpoint=8, data=2),
    line("b", 120, 130, 30, 30, init=10),
    line("b", 120, 160, 30, 50, 42, init=10, step=20, evaluation=9),
    line("c", 165, 168, 50, 50, init=3),
]
SECONDS = {
    "step": 70.0,
    "lost": 10.0,
    "data": 2.0,
    "compile": 20.0,
    "checkpoint": 8.0,
    "evaluation": 9.0,
    "init": 23.0,
    "restart": 25.0,
    "paused": 0.0,
    "other": 1.0,
}


def test_a_run_of_three_attempts():
    found = account(STORY)
    assert found.seconds == pytest.approx(SECONDS, abs=1e-6)
    assert found.whole == pytest.approx(168, abs=1e-6)
    assert found.goodput == pytest.approx(70 / 168)
    first, second, third = found.attempts
    assert (first.resumed, first.reached, first.kept, first.end) == (0, 40, 30, None)
    assert (second.resumed, second.reached, second.kept, second.end) == (30, 50, 50, 42)
    assert (third.resumed, third.reached, third.end) == (50, 50, None)
    assert second.seconds["restart"] == pytest.approx(20)


def test_steps_between_two_rows_count_in_proportion():
    """The checkpoint is of step 24: 6 of the 20 steps from 10 to 30 are lost, and all later."""
    lines = [*STORY[:4], line("b", 120, 121, 24, 24, init=1)]
    assert account(lines).seconds["lost"] == pytest.approx(30 * 6 / 20 + 10)


def test_going_back_further_loses_what_two_attempts_did():
    lines = [*STORY[:6], line("c", 165, 168, 20, 20, init=3)]
    found = account(lines)
    assert found.seconds["lost"] == pytest.approx(15 + 10 + 20)  # 20 to 30, all later, all of b
    assert [attempt.kept for attempt in found.attempts] == [20, 20, 20]


def test_a_step_that_was_under_way_at_the_kill_is_lost():
    lines = [*STORY[:3], line("a", 0, 97, 0, 30, init=10, compile=20, step=57), *STORY[4:6]]
    assert account(lines).seconds["lost"] == pytest.approx(7)
    unfinished = account(lines[:4])  # no later attempt: it may still be running
    assert unfinished.seconds["lost"] == 0


def test_a_run_that_was_done_and_is_extended_was_paused():
    lines = [line("a", 0, 100, 0, 9, 0, init=10, step=90), line("b", 5100, 5200, 9, 15, step=60)]
    found = account(lines)
    assert (found.seconds["paused"], found.seconds["restart"]) == (5000, 0)
    assert found.goodput == pytest.approx(150 / 200)
    assert "goodput: 75.0% of 3m20s went" in report(found)


def test_going_back_within_an_attempt():
    lines = [
        line("a", 0, 50, 0, 0, init=50),
        line("a", 0, 60, 0, 10, init=50, step=10),
        line("a", 0, 75, 0, 25, init=50, step=25),
        line("a", 0, 76, 10, 10, init=50, step=26),
        line("a", 0, 96, 0, 30, 0, init=50, step=46),
    ]
    found = account(lines)
    assert found.seconds["lost"] == pytest.approx(15 + 1)
    assert found.seconds["step"] == pytest.approx(30)


def test_a_clock_that_goes_back_makes_restarts_shorter_never_negative():
    lines = [line("a", 0, 100, 0, 5, init=50, step=50), line("b", 60, 80, 5, 9, init=15, step=5)]
    found = account(lines)
    assert found.seconds["restart"] == 0
    assert found.seconds["step"] == 55
    back = [line("a", 0, 100, 0, 5, init=10, step=90), line("a", 0, 20, 0, 7, init=10, step=130)]
    assert account(back).whole == 140  # by the counted seconds, which do not depend on the clock


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b"3",
        b"null",
        b"[1]",
        b'{"attempt": "x"}',
        line("x", 0, 1, init=-1.0),
        line("x", 0, 1, init=float("nan")),
        line("x", 0, float("inf")),
        line("x", 0, 1, init=10**400),
        line("x", 0, 1, None),
        line("x", 0, 1, 0, None),
        line("x", 0, 1, 0, -3),
        line("x", 0, 1, 0, 1.5),
        line("x", 0, 1, 0, 1, "0"),
        line("x", 0, 1, init="2"),
        line(["x"], 0, 1),
        line(7, 0, 1),
    ],
)
def test_a_line_that_is_no_row_is_left_out_and_said(garbage):
    found = account([*STORY[:3], garbage, *STORY[3:]])
    assert found.seconds == account(STORY).seconds
    assert found.unreadable == 1
    assert "1 unreadable line skipped" in report(found)


time = st.floats(0, 1e9) | st.floats(0, 1e3) | st.integers(0, 1000)
step = st.integers(0, 50)
row = st.fixed_dictionaries(
    {
        "attempt": st.sampled_from("abcd"),
        "began": time,
        "time": time,
        "from": step,
        "step": step,
        "seconds": st.dictionaries(st.sampled_from(["step", "init", "data", "compile", "x"]), time),
    },
    optional={"end": st.none() | st.integers(0, 255)},
).map(lambda row: json.dumps(row).encode())


@settings(max_examples=200, deadline=None)
@given(st.lists(row | st.binary(max_size=30), max_size=12))
def test_it_always_adds_up(lines):
    found = account(lines)
    seconds = found.seconds
    assert set(seconds) == set(CATEGORIES)
    assert all(0 <= part < math.inf for part in seconds.values())
    assert all(part >= 0 for attempt in found.attempts for part in attempt.seconds.values())
    assert math.fsum(seconds.values()) == found.whole
    whole = math.fsum(attempt.gap + attempt.own for attempt in found.attempts)
    assert whole == pytest.approx(found.whole, rel=1e-12)
    assert 0 <= found.goodput <= 1
    assert sum(apportion(list(seconds.values()), 1000)) == (1000 if found.whole else 0)
    report(found)


# Rows without damage, from the first start to the last row.
length = st.floats(0, 1e5)
phases = st.fixed_dictionaries({name: length for name in ("step", "init", "data", "checkpoint")})


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(phases, length, length), min_size=1, max_size=6))
def test_with_clocks_that_run_it_is_the_time_from_the_first_start_to_the_last_row(story):
    now, lines = DAY, []
    for number, (seconds, unmeasured, pause) in enumerate(story):
        began, now = now, now + math.fsum(seconds.values()) + unmeasured
        lines.append(line(str(number), began - DAY, now - DAY, 0, 1, **seconds))
        last, now = now, now + pause
    assert account(lines).whole == pytest.approx(last - DAY, abs=1e-5, rel=1e-9)


@given(st.lists(st.floats(0, 1e9) | st.sampled_from([0.0, 1.0]), max_size=9), st.integers(0, 10**6))
def test_shares_add_up_and_are_right_to_one_unit(parts, units):
    found = apportion(parts, units)
    whole = math.fsum(parts)
    assert sum(found) == (units if whole else 0)
    for part, share in zip(parts, found, strict=True):
        assert abs(share - (part / whole * units if whole else 0)) <= 1


def test_the_command(tmp_path, capsys):
    (tmp_path / GOODPUT).write_bytes(b"\n".join([*STORY, b'{"torn']))
    assert main(["goodput", f"--workdir={tmp_path}", f"--plot={tmp_path / 'p.png'}"]) == 0
    out = capsys.readouterr().out
    assert "| lost       | steps repeated after a restart" in out
    [whole] = [text for text in out.splitlines() if text.startswith("| all ")]
    assert whole.split("|")[3:5] == ["   168.0 ", " 100.0 "]
    killed, asked, last = [
        [cell.strip() for cell in text.split("|")[1:-1]]
        for text in out.splitlines()
        if text.startswith(("| 1 ", "| 2 ", "| 3 "))
    ]
    assert killed[2:] == ["killed", "0", "40", "10", "0.0s", "1m40s", "50.0"]
    assert asked[2:] == ["exit 42", "30", "50", "0", "20.0s", "40.0s", "50.0"]
    assert last[2:5] == ["killed or running", "50", "50"]
    assert "goodput: 41.7% of 2m48s went into steps that the run kept\n" in out
    assert "1 unreadable line skipped" in out
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")

    assert main(["goodput", f"--workdir={tmp_path}", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["seconds"] == pytest.approx(SECONDS, abs=1e-6)
    assert told["unreadable_lines"] == 1
    assert [attempt["lost_steps"] for attempt in told["attempts"]] == [10, 0, 0]


def test_the_plot_has_slices_in_the_order_of_time_and_no_gap_of_days(tmp_path):
    """Attempt 4 starts two days after a kill, attempt 5 one day after the end of the run."""
    later = [
        line("d", 200_000, 200_300, 50, 90, 0, init=3, step=280),
        line("e", 290_000, 290_100, 90, 99, 0, init=3, step=90),
    ]
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        write_plot(tmp_path / "plot.svg", account([*STORY, *later]))
    texts = re.findall(">([^<>]+)</text>", (tmp_path / "plot.svg").read_text())
    names = [text.split()[0] for text in texts if text.endswith("%") and "goodput" not in text]
    order = ["restart", "init", "compile", "step", "lost", "data", "checkpoint", "evaluation"]
    assert names == [*order, "other"]
    assert "4 (2d later): exit 0" in texts and "5 (1d later): exit 0" in texts
    assert "2: exit 42" in texts and "minutes" in texts
    ticks = [float(text) for text in texts if re.fullmatch(r"[\d.]+", text)]
    assert 8 <= max(ticks) <= 12  # the longest attempt, twice


@pytest.mark.parametrize("content", [None, b"", b"nothing\n"])
def test_a_folder_without_rows_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / GOODPUT).write_bytes(content)
    with pytest.raises(UserError, match=r"goodput\.jsonl.*set --workdir to"):
        main(["goodput", f"--workdir={tmp_path}"])
