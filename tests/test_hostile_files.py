"""Garbage in files of a workdir, a store or a corpus gives a value or one sentence, nothing else.

Each reader gets its files with bytes flipped, removed or inserted, and with JSON values replaced
(tests/garbage.py).  It may accept a file, or say in one sentence which file is damaged.  The long
form tries thousands of files.
"""

import dataclasses
import json
import os
from collections.abc import Callable

import pytest
from etils import epath
from garbage import at, json_file, lines_file, paths
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_run import small_config

from moe_jax.checkpoint import manifest
from moe_jax.config import read_config, to_dict, to_json
from moe_jax.data.build import build_store
from moe_jax.data.config import DataConfig
from moe_jax.data.corpora import find_streams
from moe_jax.errors import LONGEST, UserError
from moe_jax.moe.types import Ledger, Outcomes
from moe_jax.record.report import has_last_eval, read_row, truncate
from moe_jax.record.settings import SETTINGS, Settings, read_settings
from moe_jax.run.resume import check_same_text
from moe_jax.run.setup import resolve_config
from moe_jax.tools import ledger
from moe_jax.tools.goodput import account
from moe_jax.tools.results.group import group
from moe_jax.tools.results.read import read_run, read_runs
from moe_jax.tools.results.table import groups_table, runs_table

SECONDS = 60  # for one file of a few KiB: longer is a hang, also on a busy machine
COUNTS = pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.full)])


def fuzz(count: int, files: st.SearchStrategy, check: Callable[[bytes], None]) -> None:
    """Call `check` with `count` examples of `files`, the same in each run."""

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=SECONDS * 1000,
        suppress_health_check=list(HealthCheck),
    )
    @given(files)
    def run(raw: bytes) -> None:
        check(raw)

    run()


def is_sentence(text: str, name: str) -> None:
    assert name in text and len(text) <= LONGEST, text
    assert text.isprintable() and text.endswith("."), text


def refused_or_fine(read: Callable[[], object], name: str) -> None:
    """Call `read`; it may raise a UserError with a good sentence, and any other error fails."""
    try:
        read()
    except UserError as error:
        is_sentence(str(error), name)


CONFIG = small_config("*.txt", **{"model.vocab_size": 258, "train.steps": 8})
ROWS = [
    {"step": 1, "loss": 3.5, "lm_loss": 3.0, "tokens_per_second": 9.0, "drop_fraction": 0.25},
    {"step": 8, "loss": 2.5, "lm_loss": 2.0, "grad_norm": "nan", "layers": {"load": [[1, 2]]}},
    {"step": 8, "eval_loss": 2.25, "eval_loss_by_source": {"a": 2.0}},
]


@COUNTS
def test_the_resolved_config(tmp_path, count):
    path = tmp_path / "config.json"
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)

    def check(raw: bytes) -> None:
        path.write_bytes(raw)
        refused_or_fine(lambda: to_json(read_config(path)), "config.json")
        refused_or_fine(lambda: resolve_config(CONFIG, tmp_path, 8), "")  # names the key

    fuzz(count, json_file(to_dict(CONFIG)), check)


@pytest.mark.full
@pytest.mark.parametrize("number", [0, -1, 2**31, 2**40])
def test_every_number_of_a_config_may_be_absurd(tmp_path, number):
    """Huge sizes must not take long: the program counts parameters and computes routing groups."""
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    plain = to_dict(CONFIG)
    for place in paths(plain):
        if type(at(plain, place)) not in (int, float):
            continue
        changed = json.loads(json.dumps(plain))
        at(changed, place[:-1])[place[-1]] = number
        (tmp_path / "config.json").write_text(json.dumps(changed))
        read_run(tmp_path, "run")
        refused_or_fine(lambda: resolve_config(CONFIG, tmp_path, 8), "")


@COUNTS
def test_results_of_a_folder(tmp_path, count):
    run = tmp_path / "run"
    run.mkdir()
    files = {
        "config.json": json_file(to_dict(CONFIG)),
        "metrics.jsonl": lines_file(ROWS),
        "sweep.json": json_file({"run": {"config": "x"}, "other-run": {"config.seed": 3}}),
    }

    def check(found: tuple[str, bytes]) -> None:
        (run / "config.json").write_text(to_json(CONFIG))
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
        name, raw = found
        (tmp_path if name == "sweep.json" else run).joinpath(name).write_bytes(raw)
        results = read_runs(tmp_path)
        assert all((tmp_path / one.name).parent == tmp_path for one in results)
        text = f"{runs_table(results)}\n{groups_table(group(results))}"
        text.encode()

    fuzz(count, st.one_of([st.tuples(st.just(n), raw) for n, raw in files.items()]), check)


@COUNTS
def test_the_settings(tmp_path, count):
    versions = {"packages": {"jax": "0.10.2"}, "git": None}
    line = Settings(0, to_dict(CONFIG), "cpu", 8, 1, "--a=b", versions)
    rows = [dataclasses.asdict(line), dataclasses.asdict(dataclasses.replace(line, after=4))]

    def read() -> None:
        for one in read_settings(tmp_path):
            assert one.devices * one.processes > 0
            one.typed()

    def check(raw: bytes) -> None:
        (tmp_path / SETTINGS).write_bytes(raw)
        refused_or_fine(read, SETTINGS)

    fuzz(count, lines_file(rows), check)


@COUNTS
def test_metrics(tmp_path, count):
    path = tmp_path / "metrics.jsonl"

    def check(raw: bytes) -> None:
        path.write_bytes(raw)
        has_last_eval(path, 8, 1)
        truncate(path, 4)
        aside = tmp_path / "metrics.jsonl.1.tail"
        kept, tail = path.read_bytes(), aside.read_bytes() if aside.exists() else b""
        rows = [read_row(line) for line in kept.splitlines()]
        assert all(row is not None and row["step"] <= 4 for row in rows)
        assert not kept or kept.endswith((b"\n", b"\r"))
        assert sorted((kept + tail).splitlines()) == sorted(raw.splitlines())
        aside.unlink(missing_ok=True)

    fuzz(count, lines_file(ROWS), check)


@COUNTS
def test_the_ledger(tmp_path, count):
    counts = {
        outcome: [[1, 2, 0], [3, 0, 0]] for outcome in Outcomes._fields if outcome != "unsampled"
    }
    row = {"step": 4, "sources": ["a", "b", "c"], "assignments": [12, 12]}
    row |= dict.fromkeys(Ledger._fields, counts)
    path = tmp_path / "ledger.jsonl"

    def check(raw: bytes) -> None:
        path.write_bytes(raw)

        def show() -> None:
            totals = ledger.read(path)
            ledger.report(totals).encode()
            ledger.write_csv(tmp_path / "out.csv", totals)
            ledger.discrepancy(totals)

        refused_or_fine(show, "ledger.jsonl")

    fuzz(count, lines_file([row, row | {"step": 5}]), check)


@COUNTS
def test_the_record_of_the_data(tmp_path, count):
    path = tmp_path / "data.json"
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 9)
    store = build_store(DataConfig(source="text", files=f"{tmp_path}/*.txt"), tmp_path / "stores")

    def check(raw: bytes) -> None:
        path.write_bytes(raw)
        refused_or_fine(lambda: check_same_text(store, tmp_path), "data.json")

    fuzz(count, json_file({"fingerprint": store.fingerprint}), check)


@COUNTS
def test_the_manifest_of_a_checkpoint(tmp_path, count):
    step = epath.Path(tmp_path) / "1"
    (step / "d").mkdir(parents=True)
    for name in ("a", "d/b", "commit_success.txt"):
        (step / name).write_bytes(name.encode() * 9)
    manifest.write(step)
    assert manifest.verify(step) is None
    good = json.loads((step / "manifest.json").read_text())

    def check(raw: bytes) -> None:
        (step / "manifest.json").write_bytes(raw)
        reason = manifest.verify(step)
        assert reason is None or (reason.isprintable() and 0 < len(reason) <= LONGEST)

    fuzz(count, json_file(good), check)


@COUNTS
@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_corpora(tmp_path, kind, count):
    path = tmp_path / "corpus.txt"
    rows = [{"text": "a text of some length", "n": 1}, {"n": [1.5], "text": "größe 日本 🙂"}]

    def check(raw: bytes) -> None:
        path.write_bytes(raw)
        (stream,) = find_streams(DataConfig(source=kind, files=str(path)))

        def read() -> None:
            list(stream.digests())
            for document in stream.documents():
                document.text.encode()

        refused_or_fine(read, "corpus.txt")

    fuzz(count, lines_file(rows), check)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    """A FIFO in the place of a file is refused: opening it would block until a process writes."""
    logs = ("metrics.jsonl", "ledger.jsonl", "goodput.jsonl")
    for name in ("config.json", *logs, "data.json", "manifest.json"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "commit_success.txt").touch()
    for read in (read_config, ledger.read, account.read, lambda path: truncate(path, 1)):
        for name in ("config.json", *logs):
            with pytest.raises(UserError, match=f"{name} .*not a file"):
                read(tmp_path / name)
    assert manifest.verify(epath.Path(tmp_path)).endswith(
        "is a link, a pipe or a device: replace it by the file itself"
    )
    (run,) = read_runs(tmp_path)
    assert "not a file" in run.state
