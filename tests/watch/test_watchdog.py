"""A process that hangs prints its stacks and ends with 42; any other process is not ended."""

import subprocess
import sys
import threading

import pytest
from small_run import flags, write_corpus

from moe_jax.errors import UserError
from moe_jax.sections import WatchdogConfig
from moe_jax.watch.watchdog import Watchdog

TICK = 0.005


def watched(limits: WatchdogConfig, folder=None):
    """(watchdog, event set by its `end`, exit codes passed to `end`)."""
    codes, over = [], threading.Event()

    def end(code):
        codes.append(code)
        over.set()

    return Watchdog(limits, folder, end=end, tick=TICK), over, codes


def test_a_phase_over_its_limit_ends_the_process_and_shows_every_thread(tmp_path, capfd):
    watch, over, codes = watched(WatchdogConfig(data=4 * TICK), tmp_path)

    def reads_for_ever():
        over.wait(30)

    other = threading.Thread(target=reads_for_ever)
    other.start()
    with watch, watch("data"):
        assert over.wait(30)
    other.join()
    assert codes == [42]
    [stacks] = tmp_path.glob("stacks-*.txt")
    said = capfd.readouterr().err
    assert said.startswith("Error: data has taken more than 0.02 s (watchdog.data), so this")
    for text in (said, stacks.read_text()):
        assert "reads_for_ever" in text and "test_a_phase_over_its_limit" in text


def test_each_phase_counts_by_itself_and_nothing_between_them():
    watch, over, codes = watched(WatchdogConfig(step=1000 * TICK))
    with watch:
        with watch("step"):
            watch._seconds = 999 * TICK  # nearly over
        with watch("step"):
            assert not over.wait(5 * TICK)
        watch._seconds = 5000 * TICK
        assert not over.wait(5 * TICK)
    assert codes == []


def test_a_phase_that_gets_on_counts_anew_and_one_that_stops_does_not(capfd):
    watch, over, codes = watched(WatchdogConfig(start=1000 * TICK))
    with watch, watch("start"):
        for _ in range(3):
            watch._seconds = 999 * TICK  # nearly over
            watch.on_progress()
            assert not over.wait(3 * TICK)
        watch._seconds = 1000 * TICK
        assert over.wait(30)
    assert codes == [42]
    said = capfd.readouterr().err
    assert said.startswith("Error: start has made no progress for more than 5 s (watchdog.start)")


def test_no_limit_and_a_phase_without_one():
    watch, over, codes = watched(WatchdogConfig(compile=0.0, step=TICK))
    with watch, watch("compile"):
        watch._seconds = 1e9
        assert not over.wait(5 * TICK)
    assert codes == []


def test_time_in_which_the_process_was_stopped_does_not_count(monkeypatch):
    """A clock that jumps by an hour between two checks, as after ctrl-Z."""
    watch, over, codes = watched(WatchdogConfig(step=100 * TICK))
    looks = iter(range(10**9))
    monkeypatch.setattr("moe_jax.watch.watchdog.time.monotonic", lambda: 3600.0 * next(looks))
    with watch, watch("step"):
        assert over.wait(30)
    assert codes == [42]
    assert next(looks) > 50  # each hour counted as two ticks


@pytest.mark.parametrize("wrong", [-1.0, float("nan")])
def test_a_wrong_limit_is_refused(wrong):
    with pytest.raises(UserError, match=r"watchdog.step is .*: set seconds, or 0 for no limit"):
        WatchdogConfig(step=wrong)


def test_a_heartbeat_of_never_is_refused():
    with pytest.raises(UserError, match=r"watchdog.heartbeat is 0: set seconds, 1 or more"):
        WatchdogConfig(heartbeat=0)


HANGS = """
import sys, threading
from moe_jax.data import feed
from moe_jax.cli.exit import run
from moe_jax.cli.train import main

def never(self):
    threading.Event().wait()

feed.DeviceFeed.__next__ = never
sys.argv[0] = "moe_jax train"
run(main)
"""


def test_a_run_whose_data_never_comes_ends_with_42(tmp_path, cli_env):
    given = flags(tmp_path / "run", write_corpus(tmp_path / "text"), **{"watchdog.data": 1.0})
    done = subprocess.run(
        [sys.executable, "-c", HANGS, *given], env=cli_env, capture_output=True, text=True
    )
    assert done.returncode == 42, done.stderr
    assert "Error: data has taken more than 1 s (watchdog.data)" in done.stderr
    assert "in never" in done.stderr
    assert len(list((tmp_path / "run").glob("stacks-*.txt"))) == 1
