"""A run with bad batches: what it skips, which step it rewinds to, what can be replayed."""

import hashlib
import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from bad_batches import patches
from small_run import flags, small_config, train_rows, write_corpus

from moe_jax.checkpoint import Checkpoints
from moe_jax.checkpoint.tree import named_leaves
from moe_jax.cli.replay import main as replay_command
from moe_jax.cli.train import main
from moe_jax.errors import UserError
from moe_jax.parallel.distributed import DONE
from moe_jax.record.rewind import REWINDS, read_rewinds
from moe_jax.record.settings import SETTINGS, read_settings
from moe_jax.run.restore import restored_state
from moe_jax.run.setup import prepare
from moe_jax.tools import replay
from moe_jax.train import guard
from moe_jax.train.state import to_disk

# Two steps that are skipped, then three in a row that are finite and far too large.
BAD = {4: np.nan, 5: np.nan, 9: 1e4, 10: 1e4, 11: 1e4}
MIN_ACCEPTED = 6  # accepted steps before a spike is one: the run is short
OVERRIDES = {
    "model.num_layers": 1,
    "model.moe.every": 1,
    "model.moe.router": "sigmoid_bias",
    "model.moe.group_rows": 4,
    "train.steps": 14,
    "train.max_skipped": 2,
    "train.log_every": 4,
    "checkpoint.every_steps": 2,
    "checkpoint.keep_last": 99,
    "eval.rows": 32,
    "eval.samples": 0,
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """The workdir of such a run, its text, and the data steps that it read."""
    folder, asked = tmp_path_factory.mktemp("divergence"), []
    files = write_corpus(folder / "text")
    sigterm = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        for change in (*patches(BAD, asked), (guard, "MIN_ACCEPTED", MIN_ACCEPTED)):
            patch.setattr(*change)
        assert main(["train", *flags(folder / "run", files, **OVERRIDES)]) == DONE
        signal.signal(signal.SIGTERM, sigterm)
        yield SimpleNamespace(workdir=folder / "run", files=files, asked=list(asked))


def arrays(root: Path, step: int) -> dict[str, np.ndarray]:
    checkpoints = Checkpoints(root)
    tree = {
        name: np.empty(leaf.shape, leaf.dtype) for name, leaf in checkpoints.describe(step).items()
    }
    return checkpoints.restore(step, tree)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.lifecycle
def test_a_refused_step_changes_nothing_but_the_counters(bad):
    """Parameters, moments, router bias and running means, saved before and after two such steps."""
    before, after = (arrays(bad.workdir / "checkpoints", step) for step in (4, 6))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"step", "guard/not_finite"}
    assert after["guard/not_finite"] == 2 and np.any(after["router/bias"])
    later = arrays(bad.workdir / "checkpoints", 8)
    assert not np.array_equal(later["params/embed_VD"], after["params/embed_VD"])
    rows = {row["step"]: row for row in train_rows(bad.workdir)}
    assert [rows[step]["skipped_not_finite"] for step in (4, 5, 8)] == [0, 1, 2]
    assert (rows[5]["skipped"], rows[5]["spike"], rows[5]["grad_norm"]) == (1, 0, "nan")


def test_too_many_in_a_row_go_back_past_their_batches(bad):
    (rewind,) = read_rewinds(bad.workdir)
    assert (rewind.step, rewind.data_step) == (8, 12)  # the parameters of 9 are those that failed
    assert (rewind.refused, rewind.skipped) == ((10, 12), (8, 11))
    assert "more than 100 times" in rewind.why
    assert bad.asked[-6:] == [12, 13, 14, 15, 16, 17]
    assert [row["step"] for row in train_rows(bad.workdir)] == [1, 4, 5, 6, 8, 9, 12, 14]
    tail = (bad.workdir / "metrics.jsonl.1.tail").read_text().splitlines()
    spikes = [json.loads(line) for line in tail]
    assert [row["spike"] for row in spikes] == [1, 1, 1]
    assert min(row["grad_norm"] / row["mean_grad_norm"] for row in spikes) > 100


def test_no_checkpoint_holds_what_is_not_finite(bad):
    root = bad.workdir / "checkpoints"
    assert Checkpoints(root).steps() == [2, 4, 6, 8, 10, 12, 14]
    assert Checkpoints(root).quarantined() == ["10"]
    for folder, steps in ((root, (6, 8, 14)), (root / "quarantine", (10,))):
        for step in steps:
            assert all(np.isfinite(leaf).all() for leaf in arrays(folder, step).values()), step


def test_the_flight_record_names_the_batch(bad):
    records = {
        path.parent.name: json.loads(path.read_text())
        for path in (bad.workdir / "flight").glob("*/record.json")
    }
    assert sorted(records) == ["10", "12", "5"]
    record = records["10"]
    assert (record["data_step"], record["rewinds"], record["row"]["spike"]) == (9, 0, 1)
    assert record["settings"] == len(read_settings(bad.workdir)) == 1
    assert [row["step"] for row in record["history"]] == list(range(1, 11))
    assert len(record["history"][3]["layers"]["load_cv"]) == 1
    run = prepare(small_config(bad.files, **OVERRIDES), bad.workdir, lambda line: None)
    batch = record["batch"]
    assert batch["windows"] == run.batches.window_ids(9, np.arange(32)).tolist()
    windows = run.batches.rows(9, np.arange(32))
    assert batch["sources"][7] == sorted({run.store.sources[i] for i in windows.sources_BT[7]})
    assert record["mesh"] == {"data": 8, "fsdp": 1, "expert": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("arguments", "judged", "refused"),
    [
        (["--step=10"], "10 equals flight/10/record.json bit for bit", True),
        (["--step=10", "--noflight"], "12 equals metrics.jsonl bit for bit", False),
    ],
)
def test_replay(bad, capsys, arguments, judged, refused):
    """A step that was skipped before the rewind, and the step that replaced it."""
    before = contents(bad.workdir)
    assert replay_command(["replay", f"--workdir={bad.workdir}", *arguments]) == 0
    out = capsys.readouterr().out
    assert f"Step {judged}" in out and ("skipped: " in out) == refused
    assert contents(bad.workdir) == before


@pytest.mark.full
def test_replay_says_what_differs(bad, tmp_path, capsys):
    shutil.copytree(bad.workdir, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    (row,) = (row for row in rows if row["step"] == 14 and "loss" in row)
    row["loss"] = float(np.nextafter(np.float32(row["loss"]), np.float32(9)))
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert replay_command(["replay", f"--workdir={tmp_path / 'run'}", "--step=14"]) == 1
    assert capsys.readouterr().out.endswith("differs from metrics.jsonl in loss.\n")


def test_replay_compares_every_number():
    new = {
        "step": 3,
        "loss": 1.0,
        "grad_norm": "nan",
        "layers": {"z_loss": [1.0], "load_cv": [2.0]},
    }
    old = {**new, "loss": 1.0000001, "mfu": 0.4, "layers": {"z_loss": [1.0], "load_cv": [2.5]}}
    assert replay.differences(new, old) == ["loss", "layers.load_cv"]
    assert replay.differences(new, new | {"mfu": 0.4}) == []


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        ("15", "--step=15: the run has steps 1 to 14"),
        ("0", "--step=0: steps are counted from 1"),
        ("1", "There is no good checkpoint before step 1 in .* or add --from_beginning"),
    ],
)
def test_replay_refuses(bad, step, sentence):
    with pytest.raises(UserError, match=sentence):
        replay_command(["replay", f"--workdir={bad.workdir}", f"--step={step}"])


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[" * 100_000,
        "[]",
        '{"history": 7}',
        '{"history": [{"step": 3}], "rewinds": 9, "settings": 1}',
        '{"history": [{"step": 3}], "rewinds": 0, "settings": 9}',
        '{"history": [{"step": 3}], "rewinds": 0}',
        '{"history": [{"step": 4}], "rewinds": 0, "settings": 1}',
    ],
)
def test_replay_refuses_a_damaged_flight_record(bad, tmp_path, text):
    shutil.copy(bad.workdir / SETTINGS, tmp_path)
    (tmp_path / "flight" / "3").mkdir(parents=True)
    (tmp_path / "flight" / "3" / "record.json").write_text(text)
    with pytest.raises(
        UserError, match=r"flight/3/record\.json is damaged or .*, or add --noflight"
    ):
        replay_command(["replay", f"--workdir={tmp_path}", "--step=3"])


def test_replay_wants_the_devices_of_the_run(bad, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    with pytest.raises(UserError, match="used 8 devices, and 4 devices would"):
        replay_command(["replay", f"--workdir={bad.workdir}", "--step=9"])


def test_a_checkpoint_from_before_the_guard(bad, tmp_path):
    """The running means are reset, which a line says; the rest of the state is restored."""
    config, lines = small_config(bad.files, **OVERRIDES), []
    run = prepare(config, tmp_path / "run", lambda line: None)
    old = Checkpoints(tmp_path / "run" / "checkpoints")
    whole = arrays(bad.workdir / "checkpoints", 8)
    old.save(8, {name: leaf for name, leaf in whole.items() if not name.startswith("guard/")})
    old.close()
    state = restored_state(run, 8, lines.append)
    assert lines == ["step guard: running means reset, because the checkpoint has none"]
    leaves = named_leaves(to_disk(state, run.model.layout))
    guard = {name: leaves.pop(f"guard/{name}") for name in state.guard}
    assert (guard["changed"], guard["accepted"], guard["loss"]) == (8, 0, 0)
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, whole[name])


def test_replay_refuses_without_the_rewinds_file(bad, tmp_path):
    shutil.copytree(bad.workdir, tmp_path / "run")
    (tmp_path / "run" / REWINDS).unlink()
    with pytest.raises(UserError, match=r"differs from .* the checkpoint of step 12 was saved"):
        replay_command(["replay", f"--workdir={tmp_path / 'run'}", "--step=13"])


@pytest.mark.full
def test_a_run_without_its_rewinds_file_is_refused(bad, tmp_path):
    """Without rewinds.jsonl the run would train on the batches that the rewind skipped."""
    shutil.copytree(bad.workdir, tmp_path / "run")
    (tmp_path / "run" / REWINDS).unlink()
    before = contents(tmp_path / "run" / "checkpoints")
    with pytest.raises(
        UserError, match=r"differs from the file that the checkpoint of step 14 .*restore that"
    ):
        main(["train", *flags(tmp_path / "run", bad.files, **OVERRIDES | {"train.steps": 16})])
    assert contents(tmp_path / "run" / "checkpoints") == before
    shutil.copy(bad.workdir / REWINDS, tmp_path / "run")
    assert main(["train", *flags(tmp_path / "run", bad.files, **OVERRIDES)]) == DONE


def test_a_damaged_rewinds_file_stops_the_run(bad, tmp_path):
    shutil.copytree(bad.workdir, tmp_path / "run")
    (tmp_path / "run" / REWINDS).write_text("{}\n")
    with pytest.raises(UserError, match="is damaged in line 1"):
        main(["train", *flags(tmp_path / "run", bad.files, **OVERRIDES)])
