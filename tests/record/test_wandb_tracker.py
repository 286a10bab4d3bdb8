"""Weights & Biases gets the rows of TensorBoard under one id per workdir and never delays a run."""

import io
import json
import threading
from contextlib import redirect_stdout

import pytest
from small_run import flags, small_config, train_rows, write_corpus
from wandb_file import records

from moe_jax.cli.train import main
from moe_jax.config import to_dict
from moe_jax.errors import UserError
from moe_jax.parallel.distributed import DONE
from moe_jax.record import wandb_tracker
from moe_jax.record.report import Reporter
from moe_jax.record.wandb_tracker import ID_FILE, WandbTracker, check_wandb, run_id

# Records each call; `FAULT` names the call that raises, ends the process or hangs.
STAND_IN = """
import json, os, time

def said(call, *values):
    with open({log!r}, "a") as file:
        file.write(json.dumps([call, *values]) + "\\n")
    kind, _, at = {fault!r}.partition(" ")
    if at == call and kind == "raise":
        raise RuntimeError("no\\nnetwork")
    if at == call and kind == "exit":
        os._exit(3)
    if at == call and kind == "hang":
        time.sleep(1000)

class Settings:
    def __init__(self, **kept): pass

class Table:
    def __init__(self, columns, data): self.data = data

class Run:
    url, dir = "", "here"
    def define_metric(self, name, **more): pass
    def log(self, row):
        said("log", {{k: v.data if isinstance(v, Table) else v for k, v in row.items()}})
    def finish(self, exit_code): said("finish", exit_code)

def init(settings, resume, **start):
    print("noise that is no line of the log")
    said("init", start, resume)
    return Run()
"""
ROW = {"step": 10, "loss": 2.5, "lm_loss": 2.0, "balance_loss": 1.0, "mfu": None, "tokens": 64}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Replace `wandb` by the stand-in with a fault; return the calls that it received."""
    log = tmp_path / "calls.jsonl"

    def make(fault=""):
        (tmp_path / "lib").mkdir(exist_ok=True)
        (tmp_path / "lib" / "wandb.py").write_text(STAND_IN.format(log=str(log), fault=fault))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lib"))
        return lambda: [json.loads(line) for line in log.read_text().splitlines()]

    return make


def config(**overrides):
    wandb = {"wandb.project": "p", "wandb.mode": "offline"}
    return small_config("*", **wandb | overrides)


def report(workdir, resumed, *steps, **overrides):
    stream = io.StringIO()
    with (
        redirect_stdout(stream),
        Reporter(workdir, 200, resumed, config(**overrides)) as reporter,
    ):
        for step in steps:
            reporter.log(ROW | {"step": step})
            reporter.text(step, "samples", f"text {step}")
    return stream.getvalue()


def test_it_gets_the_rows_the_texts_and_the_config(tmp_path, stand_in):
    calls = stand_in()
    shown = report(tmp_path / "run", None, 10, **{"model.moe.balance_weight": 0})
    first, row, text, last = calls()
    call, start, resume = first
    assert (call, resume, last) == ("init", "allow", ["finish", 0])
    wanted = config(**{"model.moe.balance_weight": 0})
    assert start == {
        "project": "p",
        "entity": None,
        "name": "run",
        "id": json.loads((tmp_path / "run" / ID_FILE).read_text())["id"],
        "mode": "offline",
        "dir": str(tmp_path / "run"),
        "config": to_dict(wanted),
    }
    assert row[1] == {"step": 10, "train/loss": 2.5, "train/lm_loss": 2.0, "data/tokens": 64}
    assert text[1] == {"step": 10, "eval/samples": [[10, "text 10"]]}
    assert "wandb: here\n" in shown and "noise" not in shown


def test_all_attempts_and_rewinds_have_one_id(tmp_path, stand_in):
    calls = stand_in()
    report(tmp_path / "run", None, 10, 20, 30)
    with (
        redirect_stdout(io.StringIO()),
        Reporter(tmp_path / "run", 200, 20, config()) as reporter,
    ):
        reporter.log(ROW | {"step": 30})
        reporter.rewind(10)
        reporter.log(ROW | {"step": 20})
    starts = [call[1]["id"] for call in calls() if call[0] == "init"]
    assert len(starts) == 2 and len(set(starts)) == 1
    rows = [call[1]["step"] for call in calls() if call[0] == "log" and "train/loss" in call[1]]
    assert rows == [10, 20, 30, 30, 20]
    (tmp_path / "other").mkdir()
    assert run_id(tmp_path / "other") != starts[0]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"id": 7}', '{"id": "../x"}', '{"id": ""}'])
def test_a_damaged_id_is_replaced(tmp_path, content):
    (tmp_path / ID_FILE).write_text(content)
    found = run_id(tmp_path)
    assert found.isalnum() and run_id(tmp_path) == found


@pytest.mark.parametrize("call", ["init", "log", "finish"])
@pytest.mark.parametrize("kind", ["raise", "exit", "hang"])
def test_what_fails_or_hangs_neither_ends_nor_holds_up_a_run(
    tmp_path, stand_in, monkeypatch, kind, call
):
    stand_in(f"{kind} {call}")
    monkeypatch.setattr(wandb_tracker, "CLOSE_TIMEOUT", 0.5 if kind == "hang" else 30.0)
    shown = report(tmp_path / "run", None, *range(1, 300))
    steps = [row["step"] for row in train_rows(tmp_path / "run")]
    assert steps == [*range(1, 300)]
    wanted = {
        "raise": "wandb failed (RuntimeError: no network). The run continues without it.",
        "exit": "wandb ended with exit code 3",
        "hang": "wandb took longer than 0.5 s to end and was killed",
    }
    assert shown.count(wanted[kind]) == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "wandb"]


def test_what_waits_is_bounded(tmp_path, stand_in, monkeypatch):
    stand_in("hang init")
    monkeypatch.setattr(wandb_tracker, "CLOSE_TIMEOUT", 0.5)
    monkeypatch.setattr(wandb_tracker, "MAX_WAITING", 50)
    said = []
    tracker = WandbTracker(tmp_path, config(), tmp_path, said.append)
    for step in range(20_000):  # more than a pipe can hold
        tracker.add(step, [("train/loss", 1.0)])
        assert len(tracker._waiting) <= 50
    tracker.close()
    assert "rows are lost" in said[-1]


def test_not_installed_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_tracker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb\.project is 'p' and wandb is not installed: pip"):
        check_wandb(config())
    check_wandb(small_config("*"))


def test_an_unknown_mode_is_refused():
    with pytest.raises(UserError, match=r"wandb\.mode 'off' is unknown"):
        config(**{"wandb.mode": "off"})


@pytest.mark.lifecycle
def test_a_run_in_mode_offline_writes_its_files(tmp_path, monkeypatch):
    """The real package without a network: a run and its resumption."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # a port without a listener
    corpus, workdir = write_corpus(tmp_path / "text"), tmp_path / "run"
    tracked = {"wandb.project": "p", "wandb.mode": "offline", "checkpoint.every_steps": 4}
    for steps in (4, 8):
        assert main(["train", *flags(workdir, corpus, **tracked, train__steps=steps)]) == DONE
    files = sorted(workdir.glob("wandb/offline-run-*/run-*.wandb"), key=lambda f: f.stat().st_mtime)
    assert len(files) == 2
    found = [[*records(path)] for path in files]
    (name,) = {r.run.run_id for rs in found for r in rs if r.WhichOneof("record_type") == "run"}
    assert name == json.loads((workdir / ID_FILE).read_text())["id"]
    steps, tags = [], set()
    for record in (r for rs in found for r in rs if r.WhichOneof("record_type") == "history"):
        row = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
        tags |= set(row)
        steps += [int(json.loads(row["step"]))] if "train/loss" in row else []
    assert steps == [*range(1, 9)]
    groups = {tag.partition("/")[0] for tag in tags if "/" in tag}
    assert groups == {"train", "eval", "router", "speed", "data"}
    assert any(tag.startswith("eval/samples") for tag in tags)
