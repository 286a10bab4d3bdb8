"""The seconds of each phase, in rows that survive a kill."""

import json
import threading
from types import SimpleNamespace

import pytest
from no_room import no_room

from moe_jax.errors import UserError
from moe_jax.tools.goodput.account import read
from moe_jax.watch import timekeeper
from moe_jax.watch.timekeeper import GOODPUT, Timekeeper

NEVER = 1e9  # seconds between two rows


class Outputs:
    """The outputs of a step that runs until `done` is set."""

    def __init__(self):
        self.done = threading.Event()

    def block_until_ready(self):
        assert self.done.wait(30)
        return self


@pytest.fixture
def clock(monkeypatch):
    """`clock.now += 1` advances a second; this process began 3 s before the test."""
    clock = SimpleNamespace(now=1000.0)
    fake = SimpleNamespace(time=lambda: 5e8 + clock.now, monotonic=lambda: clock.now)
    monkeypatch.setattr(timekeeper, "time", fake)
    monkeypatch.setattr(timekeeper, "process_age", lambda: 3.0)
    return clock


def rows(folder):
    return [json.loads(line) for line in (folder / GOODPUT).read_bytes().splitlines()]


def until(condition):
    """Wait for the other thread."""
    tick = threading.Event()
    assert any(condition() or tick.wait(0.002) for _ in range(10_000))


def test_every_second_is_in_one_phase(tmp_path, clock):
    with Timekeeper(tmp_path, True, NEVER) as keeper:
        with keeper("checkpoint"):
            clock.now += 4  # creating or loading the state: init
        keeper.resumed(7)
        with keeper("data"):
            clock.now += 1  # the devices have nothing to do yet
        with keeper("compile"):
            clock.now += 20
        with keeper("step"):
            clock.now += 5
        clock.now += 2  # in no phase
        with keeper("evaluation"):
            clock.now += 10
        keeper.ended(42)
    last = rows(tmp_path)[-1]
    assert last["seconds"] == {"init": 7, "data": 1, "step": 5, "compile": 20, "evaluation": 10}
    assert last["time"] - last["began"] == 45  # 3 before the test, 42 in it
    assert (last["from"], last["step"], last["end"]) == (7, 7, 42)
    assert len({row["attempt"] for row in rows(tmp_path)}) == 1


def test_waiting_for_data_is_lost_only_while_the_devices_are_idle(tmp_path, clock):
    with Timekeeper(tmp_path, True, NEVER) as keeper:
        keeper.resumed(0)
        outputs = [Outputs(), Outputs()]
        keeper.started(1, outputs[0])
        with keeper("data"):
            clock.now += 3  # hidden behind step 1
        outputs[0].done.set()
        keeper.started(2, outputs[1])
        with keeper("data"):
            clock.now += 4  # hidden behind step 2 ...
            outputs[1].done.set()
            until(lambda: keeper._attempt._step == 2)
            clock.now += 5  # ... which ends here
        keeper.ended(0)
    last = rows(tmp_path)[-1]
    assert last["seconds"] == {"init": 3, "step": 7, "data": 5}
    assert last["step"] == 2


def test_rows_come_by_themselves_while_a_phase_is_open(tmp_path):
    """A kill in the middle of a long compilation must not make it disappear."""
    with Timekeeper(tmp_path, True, beat=0.005) as keeper:
        keeper.resumed(0)
        with keeper("compile"):
            until(lambda: any("compile" in row["seconds"] for row in rows(tmp_path)))
        keeper.ended(0)
    compiling = [row["seconds"].get("compile", 0.0) for row in rows(tmp_path)]
    assert compiling == sorted(compiling)


def test_the_next_attempt_adds_to_the_file_also_after_a_torn_line(tmp_path, clock):
    for step in (0, 5):
        with Timekeeper(tmp_path, True, NEVER) as keeper:
            keeper.resumed(step)
            keeper.ended(0)
        with (tmp_path / GOODPUT).open("a") as file:
            file.write('{"attempt": "torn')
    lines = (tmp_path / GOODPUT).read_text().splitlines()
    torn = [line for line in lines if line.endswith("torn")]
    whole = [json.loads(line) for line in lines if line not in torn]
    assert len(torn) == 2
    assert [row["from"] for row in whole if "end" in row] == [0, 5]
    assert len({row["attempt"] for row in whole}) == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("x"), 1), (ValueError("x"), 1), (KeyboardInterrupt(), 130)],
)
def test_an_error_is_the_last_word(tmp_path, error, code):
    with pytest.raises(type(error)), Timekeeper(tmp_path, True) as keeper:
        keeper.resumed(0)
        raise error
    assert rows(tmp_path)[-1]["end"] == code


def test_a_command_that_is_refused_writes_nothing(tmp_path):
    with pytest.raises(UserError), Timekeeper(tmp_path, True) as keeper, keeper("checkpoint"):
        raise UserError("x")
    assert list(tmp_path.iterdir()) == []


def test_other_processes_write_nothing(tmp_path):
    with Timekeeper(tmp_path, False) as keeper:
        keeper.resumed(3)
        with keeper("step"):
            keeper.started(4, None)
        keeper.ended(0)
    assert list(tmp_path.iterdir()) == []


def test_a_row_that_cannot_be_written_stops_nothing(tmp_path, clock):
    with Timekeeper(tmp_path, True, NEVER) as keeper:
        keeper.resumed(0)
        before = len(rows(tmp_path))
        with no_room():
            keeper.resumed(1)
            with keeper("checkpoint"):
                clock.now += 6
        assert len(rows(tmp_path)) == before
        keeper.ended(0)
    assert rows(tmp_path)[-1]["seconds"]["checkpoint"] == 6  # the next row has the totals


def fast_run(keeper, clock, seconds, first=0):
    """Steps of 10 ms, an evaluation after every 200 of them; returns the last step."""
    for second in range(2, seconds + 1, 2):
        with keeper("step"):
            keeper._attempt._step = first + 100 * second
            clock.now += 1.99
        with keeper("evaluation"):
            clock.now += 0.01
    return first + 100 * seconds


@pytest.mark.parametrize(("attempts", "most"), [(1, 400_000), (144, 900_000)])
def test_a_day_stays_under_a_megabyte(tmp_path, clock, attempts, most):
    """The file size of a fast run, in one attempt and with a restart every ten minutes."""
    hours, day = 4 if attempts == 1 else 1, 24
    count = max(1, attempts * hours // day)
    for number in range(count):
        with Timekeeper(tmp_path, True, beat=timekeeper.BEAT) as keeper:
            keeper.resumed(360_000 * number)
            fast_run(keeper, clock, hours * 3600 // count, 360_000 * number)
            keeper.ended(42)
    size = (tmp_path / GOODPUT).stat().st_size
    assert size * day / hours < most
    found = read(tmp_path / GOODPUT)
    assert found.unreadable == 0 and len(found.attempts) == count
    assert found.seconds["evaluation"] == pytest.approx(hours * 18, rel=1e-3)
    assert found.seconds["step"] == pytest.approx(hours * 3582, rel=1e-3)


def test_rows_that_replace_each_other_tell_what_a_restart_lost(tmp_path, clock):
    """Equal to the sum of the steps after the restored one, anywhere between two kept rows."""
    keeper = Timekeeper(tmp_path, True, timekeeper.BEAT)
    keeper.resumed(0)
    last = fast_run(keeper, clock, 1000)
    killed = (tmp_path / GOODPUT).read_bytes()
    keeper.ended(0)
    for restored in (0, 60, 400, 12_345, 77_777, 99_900):
        (tmp_path / GOODPUT).write_bytes(killed)
        with Timekeeper(tmp_path, True, NEVER) as again:
            again.resumed(restored)
        lost = read(tmp_path / GOODPUT).seconds["lost"]
        assert lost == pytest.approx((last - restored) * 0.00995, abs=1e-2)


def test_the_last_row_is_the_newest_whether_it_is_kept_or_not(tmp_path, clock):
    """A kill leaves only the time since the last row unaccounted for."""
    with Timekeeper(tmp_path, True, timekeeper.BEAT) as keeper:
        keeper.resumed(0)
        for second in range(2, 300, 2):
            fast_run(keeper, clock, 2, 100 * (second - 2))
            assert rows(tmp_path)[-1]["step"] == 100 * second
        keeper.ended(0)


def test_going_back_keeps_the_rows_before_and_after_it(tmp_path, clock):
    with Timekeeper(tmp_path, True, NEVER) as keeper:
        keeper.resumed(0)
        last = fast_run(keeper, clock, 10)
        keeper.resumed(300)
        fast_run(keeper, clock, 10, 300)
        keeper.ended(0)
    steps = [row["step"] for row in rows(tmp_path)]
    assert steps == [0, last, 300, 1300]
    assert read(tmp_path / GOODPUT).seconds["lost"] == pytest.approx(700 * 0.00995, abs=1e-2)
