"""The data that a step uses after a rewind, and the effect of a kill during a rewind."""

import dataclasses
import json
import os

import numpy as np
import pytest

from moe_jax.checkpoint import Checkpoints
from moe_jax.checkpoint.folder import StepFolder
from moe_jax.errors import UserError
from moe_jax.files.seals import sealed, unsealed
from moe_jax.record.rewind import REWINDS, Rewind, Rewinds, data_step, last_step, read_rewinds


def line(step: int, data: int) -> Rewind:
    return Rewind(step, data, (step + 1, step + 2), (step, data - 1), "why", "now", True)


def test_data_is_a_function_of_the_lines_and_the_step():
    """Against an explicit list of data steps that each rewind truncates and continues."""
    taken = list(range(40))
    history = []
    for step, skipped in ((10, 5), (20, 3), (15, 12), (15, 1)):
        data = taken[step] + skipped
        taken[step:] = range(data, data + 40 - step)
        history.append(line(step, data))
        assert [data_step(history, n) for n in range(40)] == taken


def test_the_last_step_is_the_last_that_has_data():
    """Against counting steps from the one that the run returned to."""
    history = [line(10, 15), line(20, 28)]
    for data_steps in (28, 29, 40):
        last = 20
        while data_step(history, last) < data_steps:
            last += 1
        assert last_step(history, data_steps) == last
    assert last_step([], 28) == 28


@pytest.fixture
def saved(tmp_path):
    """A workdir with checkpoints of steps 3, 6, 9 and 12; the one of step 6 is damaged."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=9)
    for step in (3, 6, 9, 12):
        checkpoints.save(step, {"x": np.full(3, step, np.float32)})
    checkpoints.close()
    next((tmp_path / "checkpoints" / "6" / "d").iterdir()).unlink()
    return tmp_path


def opened(workdir, lines=None) -> Rewinds:
    say = (lambda text: None) if lines is None else lines.append
    return Rewinds(workdir, Checkpoints(workdir / "checkpoints", keep_last=1), say)


def steps(workdir) -> list[int]:
    return Checkpoints(workdir / "checkpoints").steps()


def untimed(history) -> list[Rewind]:
    return [dataclasses.replace(rewind, time="") for rewind in history]


def test_it_goes_back_before_the_parameters_that_diverged(saved):
    lines = []
    rewinds = opened(saved, lines)
    assert rewinds.go_back(changed=9, last=13, why="NaN") == 3  # 9 diverges and 6 is damaged
    assert steps(saved) == [3] and len(lines) == 3
    assert sorted(Checkpoints(saved / "checkpoints").quarantined()) == ["12", "6", "9"]
    (row,) = map(json.loads, (saved / REWINDS).read_text().splitlines())
    row = unsealed(row)
    assert row.pop("time").endswith("+00:00")
    expected = {"step": 3, "data_step": 13, "refused": [10, 13], "skipped": [3, 12]}
    assert row == expected | {"why": "NaN", "settled": True}
    assert [rewinds.data_step(n) for n in (0, 2, 3, 4)] == [0, 2, 13, 14]
    assert untimed(read_rewinds(saved)) == untimed(opened(saved).history)


def test_without_an_earlier_checkpoint_nothing_changes(saved):
    rewinds = opened(saved)
    assert rewinds.go_back(changed=3, last=7, why="NaN") is None
    assert not rewinds.history and not (saved / REWINDS).exists()
    assert steps(saved) == [3, 6, 9, 12]


@pytest.mark.parametrize("survives", range(5))
def test_a_kill_between_any_two_writes(saved, monkeypatch, survives):
    """A rewind replaces the file twice and moves three steps; the next start always completes it.

    Before the first replacement nothing was decided: then the run diverges and decides again.
    """
    left = survives

    def mortal(action):
        def act(*arguments):
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            return action(*arguments)

        return act

    monkeypatch.setattr(Rewinds, "_write", mortal(Rewinds._write))
    monkeypatch.setattr(StepFolder, "set_aside", mortal(StepFolder.set_aside))
    with pytest.raises(KeyboardInterrupt):
        opened(saved).go_back(changed=9, last=13, why="NaN")
    monkeypatch.undo()

    again = opened(saved)
    assert bool(again.history) == (survives > 0)
    if not again.history:
        assert steps(saved) == [3, 6, 9, 12]
        assert again.go_back(changed=9, last=13, why="NaN") == 3
    assert again.history[0].settled and steps(saved) == [3]
    assert [again.data_step(n) for n in (2, 3)] == [2, 13]
    assert opened(saved).history == again.history


def test_the_checkpoint_it_went_back_to_outlives_retention(saved):
    checkpoints = Checkpoints(saved / "checkpoints", keep_last=1)
    Rewinds(saved, checkpoints, lambda text: None).go_back(changed=9, last=13, why="NaN")
    for step in (4, 5):
        checkpoints.save(step, {"x": np.zeros(3, np.float32)})
    checkpoints.close()
    assert steps(saved) == [3, 5]


def test_a_file_that_does_not_fit_the_checkpoint_is_refused(saved):
    """Lost, truncated, altered, or of another run; only more lines than saved are accepted."""
    checkpoints = Checkpoints(saved / "checkpoints", keep_last=9)
    rewinds = Rewinds(saved, checkpoints, lambda text: None)
    rewinds.check(12)  # saved by a version without this check
    checkpoints.save(13, {"x": np.zeros(3)}, rewinds.extra_files())
    rewinds.go_back(changed=9, last=13, why="NaN")
    for step in (14, 16):
        checkpoints.save(step, {"x": np.zeros(3)}, rewinds.extra_files())
    checkpoints.wait()
    rewinds.go_back(changed=16, last=19, why="NaN")
    checkpoints.save(17, {"x": np.zeros(3)}, rewinds.extra_files())
    checkpoints.close()

    good = (saved / REWINDS).read_text()
    first, second = good.splitlines(keepends=True)
    for step in (3, 14, 17):
        opened(saved).check(step)
    other = unsealed(json.loads(first)) | {"skipped": [4, 12]}
    altered = json.dumps(sealed(other)) + "\n"  # altered, with a new seal
    flipped = first.replace('"skipped": [3, 12]', '"skipped": [4, 12]')
    (saved / REWINDS).write_text(flipped + second)
    with pytest.raises(UserError, match=r"rewinds\.jsonl.* is damaged in line 1"):
        opened(saved)
    for text in ("", first, second, altered + second, good + first, None):
        (saved / REWINDS).unlink() if text is None else (saved / REWINDS).write_text(text)
        with pytest.raises(UserError, match=r"rewinds\.jsonl.*differs from .*17/rewinds\.json"):
            opened(saved).check(17)
    (saved / REWINDS).write_text(good)
    aside = saved / "checkpoints" / "quarantine" / "13"  # quarantined by the rewind
    aside.rename(saved / "checkpoints" / "13")
    with pytest.raises(UserError, match="differs from the file that the checkpoint of step 13"):
        opened(saved).check(13)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"step": 1}',
        "[" * 100_000,
        json.dumps(dataclasses.asdict(line(3, 9)) | {"step": "../3"}),
        json.dumps(dataclasses.asdict(line(3, 9)) | {"step": -1}),
        json.dumps(dataclasses.asdict(line(3, 9)) | {"skipped": [1]}),
        json.dumps(dataclasses.asdict(line(3, 9)) | {"settled": 0}),
        json.dumps(dataclasses.asdict(line(3, 9)) | {"more": 0}),
    ],
)
def test_a_damaged_file_is_an_error_that_names_the_line(tmp_path, text):
    good = json.dumps(dataclasses.asdict(line(3, 9)))
    (tmp_path / REWINDS).write_text(f"{good}\n{text}\n")
    with pytest.raises(UserError, match=f"{REWINDS}.*line 2"):
        read_rewinds(tmp_path)


def test_what_another_run_has_begun_is_not_finished(saved):
    """No step is moved if the line's checkpoint is missing or the line is already settled."""
    begun = dataclasses.replace(line(2, 6), settled=False)
    (saved / REWINDS).write_text(json.dumps(dataclasses.asdict(begun)) + "\n")
    with pytest.raises(UserError, match="refers to a checkpoint of step 2, which does not exist"):
        opened(saved)
    assert steps(saved) == [3, 6, 9, 12]

    done = line(3, 6)
    checkpoints = Checkpoints(saved / "checkpoints", keep_last=9)
    extra_files = {"rewinds.json": [dataclasses.asdict(done)]}
    checkpoints.save(15, {"x": np.zeros(3, np.float32)}, extra_files)
    checkpoints.close()
    begun = dataclasses.replace(done, settled=False)
    (saved / REWINDS).write_text(json.dumps(dataclasses.asdict(begun)) + "\n")
    with pytest.raises(UserError, match="differs from the file that the checkpoint of step 15"):
        opened(saved)
    assert steps(saved) == [3, 6, 9, 12, 15]


def test_a_file_without_its_checkpoints_begins_nothing(tmp_path):
    (tmp_path / REWINDS).write_text(json.dumps(dataclasses.asdict(line(3, 6))) + "\n")
    with pytest.raises(UserError, match="refers to checkpoints that do not exist"):
        opened(tmp_path).check(0)
    (tmp_path / REWINDS).unlink()
    opened(tmp_path).check(0)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / REWINDS)
    with pytest.raises(UserError, match="it is not a file"):
        read_rewinds(tmp_path)


def test_a_disk_that_is_full_leaves_the_file_as_it_was(saved, monkeypatch):
    rewinds = opened(saved)
    rewinds.go_back(changed=9, last=13, why="NaN")
    before = (saved / REWINDS).read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"rewinds\.jsonl cannot be written .No space left"):
        rewinds.go_back(changed=13, last=15, why="NaN")
    assert (saved / REWINDS).read_text() == before
