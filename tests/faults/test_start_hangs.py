"""A start-up that hangs ends with 42 and prints stacks; a slow one that makes progress does not."""

import fcntl
import sys

import pytest
from small_run import flags
from trainer import OVERRIDES, peers

from moe_jax.data.build import build_store, store_root
from moe_jax.data.config import DataConfig
from moe_jax.parallel.distributed import AGAIN, DONE

LIMIT = 4  # seconds; the slow start takes several times as long
RUN = OVERRIDES | {"train.steps": 2, "watchdog.start": LIMIT}
# The trainer opens a FIFO that has no writer, and blocks as on a file system that does not answer.
READ = """
import os
from moe_jax.data.corpora import Stream

digests = Stream.digests

def then_hang(self):
    yield from digests(self)
    path = self.files[-1].path
    path.unlink()
    os.mkfifo(path)

Stream.digests = then_hang
"""
WRITE = """
import threading
from moe_jax.data.split_writer import SplitWriter

def never(self, table):
    threading.Event().wait()

SplitWriter._write_documents = never
"""
OPEN = """
import threading
import moe_jax.data.build

def never(path, weights):
    threading.Event().wait()

moe_jax.data.build.open_store = never
"""
# Each document takes a second, less than LIMIT.
SLOW = """
import time
from moe_jax.data.corpora import Stream

documents = Stream.documents

def slowly(self):
    for document in documents(self):
        time.sleep(1)
        yield document

Stream.documents = slowly
"""
CLI = """
import sys
from moe_jax.cli.exit import run
from moe_jax.cli.train import main

sys.argv[0] = "moe_jax train"
run(main)
"""


@pytest.fixture
def few(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(4):
        words = (f"text {number} word {word}" for word in range(300))
        (tmp_path / "text" / f"{number}.txt").write_text(" ".join(words))
    return f"{tmp_path}/text/*.txt"


def program(injected: str) -> list[str]:
    return [sys.executable, "-c", injected + CLI]


@pytest.mark.full
@pytest.mark.parametrize(
    ("injected", "line"),
    [(READ, "in _read_text"), (WRITE, "in never"), (OPEN, "in never")],
)
def test_a_build_that_hangs(tmp_path, few, trainers, injected, line):
    run = trainers([*flags(tmp_path / "run", few, **RUN), "--devices=1"], program=program(injected))
    assert run.finish() == AGAIN, run.text
    run.wait_for(
        r"^Error: start has made no progress for more than 4 s \(watchdog.start\), so this"
    )
    run.wait_for(line)
    [stacks] = (tmp_path / "run").glob("stacks-*.txt")
    assert "in prepare" in stacks.read_text() and "in build" in stacks.read_text()


@pytest.mark.full
def test_a_builder_that_hangs_ends_who_waits_for_it(tmp_path, few, trainers):
    config = DataConfig(source="text", files=few)
    command = [*flags(tmp_path / "run", few, **RUN), "--devices=1"]
    root = store_root(config, tmp_path / "run")
    store = build_store(config, root)
    lock = root / f"{store.fingerprint[:16]}.lock"
    (root / store.fingerprint[:16] / "manifest.json").unlink()
    with lock.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waits = trainers(command)
        assert waits.finish() == AGAIN, waits.text
    waits.wait_for("in _wait")
    assert trainers(command).finish() == DONE


@pytest.mark.full
def test_a_long_build_is_no_hang_for_who_builds_and_who_waits(tmp_path, few, trainers):
    """One of two processes reads four documents five times, one second each; the other waits."""
    command = flags(tmp_path / "run", few, **RUN | {"mesh.data": 2})
    pair = [trainers([*command, *own], program=program(SLOW)) for own in peers(2, 1)]
    assert [run.finish() for run in pair] == [DONE, DONE], pair[0].text
