"""Waits are shown with their seconds, in lines and on the bar."""

import queue

import pytest

from moe_jax.record.screen import Bar, PlainLines
from moe_jax.watch.waits import Waits


@pytest.fixture
def told():
    """(a `Waits` that checks continuously, the calls of its `tell`)."""
    said: queue.Queue = queue.Queue()
    with Waits(lambda what, seconds: said.put((what, seconds)), tick=1e-3) as waits:
        yield waits, said


def until(said: queue.Queue, wanted: str) -> float:
    """The seconds reported for a wait, after it is reported."""
    while True:
        what, seconds = said.get(timeout=60)
        if what == wanted:
            return seconds


def test_a_wait_is_told_until_it_is_over(told):
    waits, said = told
    with waits("building the store"):
        first = until(said, "building the store")
        assert until(said, "building the store") > first >= 0
        with waits("compiling the train step"):
            until(said, "compiling the train step")
        assert until(said, "building the store") > first  # the outer wait's clock continued
    assert until(said, "") == 0
    with waits("sampling"), pytest.raises(ValueError, match="lost"):
        until(said, "sampling")
        with waits("evaluating"):
            raise ValueError("lost")
    until(said, "")


def test_lines_come_ever_more_seldom(capsys):
    screen = PlainLines()
    for second in range(1, 100):
        screen.waiting("compiling the train step", float(second))
    screen.waiting("", 0.0)
    for second in range(1, 8):
        screen.waiting("evaluating", float(second))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        *(f"compiling the train step: {seconds} s so far" for seconds in (5, 10, 20, 40, 80)),
        "evaluating: 5 s so far",
    ]


def test_the_bar_says_it_beside_the_step(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    shown = []
    bar = Bar()
    monkeypatch.setattr(
        bar._bar, "update", lambda task, **given: shown.append(given.get("description"))
    )
    bar.waiting("making the state", 3.2)
    bar.begin(200, 40)
    bar.waiting("compiling the train step", 12.0)
    bar.waiting("", 0.0)
    bar.close()
    assert shown == [
        "making the state 3 s",
        "step 40/200",
        "step 40/200  compiling the train step 12 s",
        "step 40/200",
    ]
