"""The reporter: rows survive kills, the format of lines, and the bar only on terminals."""

import io
import json
import pathlib
import re
import threading
from contextlib import redirect_stdout

import jax.numpy as jnp
import numpy as np
import pytest
from no_room import no_room
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from moe_jax.errors import UserError
from moe_jax.record import board
from moe_jax.record.report import LEDGER, METRICS, Reporter, SilentReporter

ROW = {
    "step": 40,
    "loss": 3.12344,
    "lm_loss": 3.1,
    "tokens_per_second": 21300.0,
    "step_seconds": 0.5,
    "mfu": None,
    "drop_fraction": 0.012,
    "layers": {"dead_experts": [0, 2], "router_entropy": [1.5, 1.25]},
}


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def report(folder, rows, resumed=None) -> str:
    stream = io.StringIO()
    with redirect_stdout(stream), Reporter(folder, 200, resumed) as reporter:
        for row in rows:
            reporter.log(row)
    return stream.getvalue()


def read(path: pathlib.Path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_plain_lines(tmp_path):
    lines = report(tmp_path, [ROW, {"step": 50, "eval_loss": 2.5, "eval_bits_per_byte": 3.6067}])
    assert lines.splitlines() == [
        "step 40/200  loss 3.1234  lm 3.1000  tok/s 21.3k  mfu -  drop 1.2%  eta 1m20s",
        "step 50/200  eval_loss 2.5000  eval_bits_per_byte 3.6067",
    ]


def test_rows_are_json_whatever_the_numbers_are(tmp_path):
    row = {
        "step": np.int64(1),
        "loss": float("nan"),
        "grad_norm": np.float32("inf"),
        "kept": jnp.int32(7),
        "layers": {"load": jnp.arange(2.0), "worst": [float("-inf")]},
    }
    assert "loss nan" in report(tmp_path, [row])

    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    (line,) = (tmp_path / METRICS).read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {
        "step": 1,
        "loss": "nan",
        "grad_norm": "inf",
        "kept": 7,
        "layers": {"load": [0.0, 1.0], "worst": ["-inf"]},
    }


def test_each_row_is_on_disk_when_log_returns(tmp_path):
    reporter = Reporter(tmp_path, 200, None)
    reporter.log(ROW)
    assert read(tmp_path / METRICS) == [ROW]
    reporter.close()


def test_resume_sets_later_rows_and_a_torn_line_aside(tmp_path):
    report(tmp_path, [{"step": step, "loss": 1.0} for step in (10, 20, 30)])
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"step": 15, "lo')
    report(tmp_path, [{"step": 30, "loss": 2.0}], resumed=20)
    assert [(r["step"], r["loss"]) for r in read(tmp_path / METRICS)] == [
        (10, 1.0),
        (20, 1.0),
        (30, 2.0),
    ]
    tail = (tmp_path / f"{METRICS}.1.tail").read_text()
    assert tail == '{"step": 30, "loss": 1.0}\n{"step": 15, "lo'
    report(tmp_path, [], resumed=10)
    assert [r["step"] for r in read(tmp_path / f"{METRICS}.2.tail")] == [20, 30]
    assert sorted(p.name for p in tmp_path.glob("metrics*")) == [
        METRICS,
        f"{METRICS}.1.tail",
        f"{METRICS}.2.tail",
    ]


def test_a_row_without_its_line_end_is_torn(tmp_path):
    """If it were kept, the next row would be appended to the same line."""
    (tmp_path / METRICS).write_text('{"step": 1}\n{"step": 2}')
    report(tmp_path, [{"step": 2, "loss": 1.0}], resumed=2)
    assert read(tmp_path / METRICS) == [{"step": 1}, {"step": 2, "loss": 1.0}]


def test_resume_without_later_rows_leaves_the_file_alone(tmp_path):
    report(tmp_path, [{"step": 10, "loss": 1.0}])
    before = (tmp_path / METRICS).stat()
    report(tmp_path, [], resumed=10)
    assert (tmp_path / METRICS).stat().st_ino == before.st_ino
    assert not list(tmp_path.glob("*.tail"))


def test_a_fresh_start_keeps_no_row_of_a_run_that_saved_nothing(tmp_path):
    report(tmp_path, [{"step": 0, "eval_loss": 5.0}, {"step": 1, "loss": 1.0}])
    report(tmp_path, [{"step": 0, "eval_loss": 6.0}])
    assert read(tmp_path / METRICS) == [{"step": 0, "eval_loss": 6.0}]


def test_a_terminal_gets_a_bar_and_lines_above_it(tmp_path):
    stream = Terminal()
    with redirect_stdout(stream), Reporter(tmp_path, 200, None) as reporter:
        reporter.log({"step": 30, "eval_loss": 2.25})
        reporter.say("[not markup] saved step 30")
        reporter.log(ROW)
    shown = stream.getvalue()
    assert "[not markup] saved step 30" in shown and "━" in shown
    assert "\x1b[" in shown  # the bar is redrawn in place


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_narrow_terminal_shows_the_bar_and_the_time_that_is_left(tmp_path, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    with redirect_stdout(stream), Reporter(tmp_path, 200, None) as reporter:
        reporter.log(ROW)
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).rstrip().splitlines()[-1]
    bar, text = last.split(" ", 1)
    assert text.startswith("step 40/200  eta 1m20s  loss 3.12") and "mfu" not in text
    assert len(bar) == 16 and set(bar) <= set("━╸╺")


def test_other_processes_write_and_print_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    reporter = SilentReporter()
    reporter.log(ROW)
    reporter.ledger(ROW)
    reporter.say("hello")
    reporter.rewind(20)
    reporter.flush()
    reporter.close()
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


def events(path: pathlib.Path) -> list[event_pb2.Event]:
    """Read TensorFlow's framing: length, its checksum, payload, its checksum."""
    found, data = [], path.read_bytes()
    while data:
        length = int.from_bytes(data[:8], "little")
        payload, rest = data[12 : 12 + length], data[12 + length :]
        assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
        assert int.from_bytes(rest[:4], "little") == masked_crc32c(payload)
        found.append(event_pb2.Event.FromString(payload))
        data = rest[4:]
    return found


def event_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The events in the order in which TensorBoard reads them."""
    return sorted((folder / "tensorboard").iterdir())


def test_tensorboard_holds_every_number(tmp_path):
    report(tmp_path, [ROW])
    (path,) = event_files(tmp_path)
    version, row = events(path)
    assert version.file_version == "brain.Event:2"
    found = {value.tag: (row.step, value.simple_value) for value in row.summary.value}
    assert found["train/loss"] == (40, pytest.approx(3.12344))
    assert found["router/dead_experts/layer_01"] == (40, 2.0)
    assert found["router/entropy/layer_00"] == (40, 1.5)
    assert found["speed/tokens_per_second"] == (40, 21300.0)
    assert len(found) == 9  # without mfu, which is None, and without the step


def test_tensorboard_hides_what_a_resume_takes_again(tmp_path):
    report(tmp_path, [{"step": step, "loss": 1.0} for step in (10, 20, 30)])
    report(tmp_path, [{"step": 30, "loss": 2.0}], resumed=20)
    _, later = event_files(tmp_path)
    _, version, start, row = events(later)
    assert (version.step, start.step, row.step) == (21, 21, 30)
    assert start.session_log.status == event_pb2.SessionLog.START


@pytest.mark.parametrize("jump", [-86_400, -1, 0, 1])
def test_a_clock_that_jumps_neither_blocks_nor_reorders(tmp_path, monkeypatch, jump):
    """TensorBoard reads event files in the order of their names."""
    clock = {"now": 2e9}
    monkeypatch.setattr(board.time, "time", lambda: clock["now"])
    before = set(threading.enumerate())
    with redirect_stdout(io.StringIO()), Reporter(tmp_path, 200, None) as reporter:
        for step in range(1, 50):
            reporter.log({"step": step, "loss": float(step)})
            clock["now"] += jump
        reporter.rewind(20)
        reporter.log({"step": 21, "loss": 1.5})
        assert set(threading.enumerate()) <= before  # no writer thread that could die or sleep
    first, second = event_files(tmp_path)
    assert [event.step for event in events(first)[1:]] == [*range(1, 50)]
    assert [event.step for event in events(second)[1:]] == [21, 21, 21]


def test_a_full_disk_costs_no_row_and_no_event(tmp_path, capsys):
    reporter = Reporter(tmp_path, 200, None)
    for step in range(1, 40):
        with no_room(10**7 if step % 10 < 4 else 9):
            reporter.log({"step": step, "loss": 1.0})
            reporter.ledger({"step": step})
    with no_room():
        reporter.close()
    for name in (METRICS, LEDGER):
        assert [row["step"] for row in read(tmp_path / name)] == [*range(1, 34)]
    (path,) = event_files(tmp_path)
    assert [event.step for event in events(path)] == [*range(34)]
    said = capsys.readouterr().out.splitlines()
    assert f"{tmp_path / METRICS}: 6 records are lost." in said
    # For each of three files, the disk is full four times and writable again three times.
    assert sum("make room" in line for line in said) == 12
    assert sum("is written again" in line for line in said) == 9


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--workdir=.*file.* cannot be written"):
        Reporter(tmp_path / "file", 1, None)
