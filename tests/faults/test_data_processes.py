"""Data faults in real processes (checks 14, 16, 17, store corruption)."""

import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from garbage import corpus_with_a_bad_record
from small_run import eval_rows, flags, train_rows, write_corpus

from moe_jax.checkpoint import Checkpoints
from moe_jax.data.build import build_store
from moe_jax.data.config import DataConfig

EVERY = 5
# Writes the rows that the model gets to the file TOLD, and kills itself at step KILL_AT.
TOLD = """
import hashlib, json, os, signal, sys
import numpy as np
from moe_jax.data.feed import DeviceFeed
from moe_jax.cli.exit import run
from moe_jax.cli.train import main

given = DeviceFeed.__next__

def told(self):
    step, batch = given(self)
    if step == int(os.environ["KILL_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    rows = np.asarray(batch.tokens_BT).reshape(-1, batch.tokens_BT.shape[-1])
    with open(os.environ["TOLD"], "a") as file:
        file.write(json.dumps([step, rows.tolist()]) + "\\n")
    return step, batch

DeviceFeed.__next__ = told
sys.argv[0] = "moe_jax train"
run(main)
"""


def run_program(program: str, arguments: list[str], env: dict[str, str]) -> tuple[int, str, str]:
    """Run a Python program in a new process; returns exit code, stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout, done.stderr


def windows_of(tokens: np.ndarray, length: int, pad: int) -> dict[tuple[int, ...], int]:
    """Cut a stream into windows: inputs of each window -> its number.  All windows differ."""
    found = {}
    for number, start in enumerate(range(0, len(tokens) - 1, length)):
        row = tokens[start : min(start + length, len(tokens) - 1)].tolist()
        found[tuple(row + [pad] * (length - len(row)))] = number
    assert len(found) == -(-(len(tokens) - 1) // length)
    return found


@pytest.mark.full
def test_two_epochs_with_three_kills_lose_and_double_no_example(tmp_path, cli_env):
    """Counts the rows that the steps of metrics.jsonl got, recognised by their tokens."""
    files = write_corpus(tmp_path / "text", 24)
    config = DataConfig(source="text", files=files, heldout_fraction=1e-6)
    store = build_store(config, tmp_path / "stores")
    (tokens,) = store.train.read([(0, store.train.num_tokens)])
    numbers = windows_of(tokens, 32, store.pad_id)
    heldout = windows_of(store.heldout.read([(0, store.heldout.num_tokens)])[0], 32, store.pad_id)
    assert len(heldout) < 32  # less than a batch
    steps = -(-2 * len(numbers) // 32)
    command = flags(
        tmp_path / "run",
        files,
        **{
            "data.heldout_fraction": 1e-6,
            "data.store": str(tmp_path / "stores"),
            "train.steps": steps,
            "checkpoint.every_steps": EVERY,
            "eval.samples": 0,
            "eval.rows": 0,
        },
    )
    told = tmp_path / "told"
    ends = [2 * EVERY + 2, steps // 2 + 1, steps - 2, -1]
    for end in ends:
        env = cli_env | {"TOLD": str(told), "KILL_AT": str(end)}
        code, out, err = run_program(TOLD, command, env)
        assert code == (0 if end == -1 else -signal.SIGKILL), err
    assert "resuming from step" in out
    trained = [row["step"] for row in train_rows(tmp_path / "run")]
    assert trained == list(range(1, steps + 1))

    given: dict[int, list[int]] = {}
    again = 0
    *lines, evaluated = map(json.loads, told.read_text().splitlines())
    for step, rows in lines:
        found = [numbers[tuple(row)] for row in rows]
        again += step in given
        assert given.setdefault(step, found) == found  # a repeated step gets the same rows
    assert again > 0
    order = [number for step in range(steps) for number in given[step]]
    first, second = order[: len(numbers)], order[len(numbers) : 2 * len(numbers)]
    assert sorted(first) == sorted(second) == list(range(len(numbers)))
    assert first != second
    padding = [(store.pad_id,) * 32] * (32 - len(heldout))
    assert sorted(map(tuple, evaluated[1])) == sorted([*heldout, *padding])
    (last,) = eval_rows(tmp_path / "run")
    assert last["eval_tokens"] == store.heldout.num_tokens - 1 and last["eval_loss"] < 10


# Damages every chunk of the training text once step 7 has begun; nothing is kept in memory.
ROTS = """
import os, pathlib, sys
import moe_jax.data.store
from moe_jax.run.control import Control
from moe_jax.cli.exit import run
from moe_jax.cli.train import main

moe_jax.data.store.CACHE_BYTES = 0
after = Control.after

def rot(self, done, preemption):
    if done == 7:
        for path in pathlib.Path(os.environ["ROT"]).glob("*/train/tokens/c/*"):
            if os.environ["HOW"] == "gone":
                path.unlink()
            else:  # replaced at once, because half a file would be a different fault
                raw = bytearray(path.read_bytes())
                raw[::1000] = bytes(byte ^ 1 for byte in raw[::1000])
                path.with_name("rotten").write_bytes(raw)
                path.with_name("rotten").replace(path)
    return after(self, done, preemption)

Control.after = rot
sys.argv[0] = "moe_jax train"
run(main)
"""


@pytest.mark.full
def test_a_store_that_rots_under_a_run(tmp_path, cli_env):
    """Exit 1 with one sentence and good checkpoints; with a rebuilt store the end is the same."""
    files = write_corpus(tmp_path / "text", 24)
    more = {"train.steps": 16, "checkpoint.every_steps": 3, "eval.samples": 0}

    def command(name: str) -> list[str]:
        stores = {"data.store": str(tmp_path / name / "stores")}
        return flags(tmp_path / name / "run", files, **more, **stores)

    code, _, err = run_program(ROTS, command("good"), cli_env | {"ROT": str(tmp_path / "nowhere")})
    assert code == 0, err
    good = Checkpoints(tmp_path / "good" / "run" / "checkpoints")
    for how, what in (("bit", "Digest mismatch"), ("gone", "is missing")):
        env = cli_env | {"ROT": str(tmp_path / how / "stores"), "HOW": how}
        code, out, err = run_program(ROTS, command(how), env)
        assert code == 1 and "Traceback" not in err, err
        (sentence,) = [line for line in err.splitlines() if line.startswith("Error: ")]
        assert "train/tokens/c/0" in sentence and what in sentence, sentence
        assert sentence.endswith(", and the next run builds it again.")
        store = sentence.rpartition("delete ")[2].partition(", and")[0]
        kept = Checkpoints(tmp_path / how / "run" / "checkpoints")
        last = kept.steps()[-1]
        assert last in (
            6,
            9,
        )  # what was read ahead when the damage was done may still be trained on
        assert [kept.verify(step) for step in kept.steps()] == [None] * len(kept.steps())

        shutil.rmtree(store)
        code, out, err = run_program(ROTS, command(how), env | {"ROT": str(tmp_path / "nowhere")})
        assert code == 0 and f"resuming from step {last}" in out, err
        for name in ("params", "optimizer"):
            assert kept.digest(16, name) == good.digest(16, name)
        numbers = [
            [(row["step"], row["loss"]) for row in train_rows(tmp_path / name / "run")]
            for name in (how, "good")
        ]
        assert numbers[0] == numbers[1]


@pytest.mark.full
def test_bad_data_ends_the_command_with_one_line(tmp_path, run_cli):
    """The command's output for a bad record, too little text, a missing and an empty file."""
    few = write_corpus(tmp_path / "few", 2)
    bad = corpus_with_a_bad_record(tmp_path / "lines", "jsonl")
    (tmp_path / "empty.txt").touch()
    for files, kind, pattern in (
        (bad, "jsonl", "b.jsonl line 42 is not JSON"),
        (few, "text", "fewer than one batch of 32"),
        (f"{tmp_path}/none-*.txt", "text", "no file matches"),
        (f"{tmp_path}/*.txt", "text", "empty.txt is empty"),
    ):
        done = run_cli(["moe_jax", "train", *flags(tmp_path / "run", files, data__source=kind)])
        assert done.code == 1 and done.err.startswith("Error: "), done.err
        assert done.err.count("\n") == 1 and pattern in done.err
        assert not (tmp_path / "run").exists()
