"""The settings recorded for each step over resumes and rewinds, and their use by replay."""

import dataclasses
import json
import math
from pathlib import Path
from typing import cast

import pytest

from moe_jax.config import Config
from moe_jax.errors import UserError
from moe_jax.files.seals import SEAL, sealed, unsealed
from moe_jax.record.settings import (
    SETTINGS,
    Settings,
    read_settings,
    record_settings,
    settings_at,
    settings_go_back,
)
from moe_jax.sections import TrainConfig
from moe_jax.tools import replay

LAST = 20


@pytest.fixture
def begins(tmp_path, mesh_of):
    """`begins(step, devices, train_steps)`: a process starts or resumes from `step`."""

    def begin(step: int, devices: int, train_steps: int = 200) -> None:
        config = Config(train=TrainConfig(steps=train_steps))
        record_settings(tmp_path, config, mesh_of(data=devices), step)

    return begin


def taken(workdir: Path) -> list[tuple[int, int]]:
    found = [settings_at(read_settings(workdir), step) for step in range(1, LAST + 1)]
    return [(settings.devices, settings.config["train"]["steps"]) for settings in found]


def test_a_step_has_the_settings_of_the_process_that_took_it_last(tmp_path, begins):
    """Against a list that each start and each rewind overwrites from its step on."""
    expected = [(8, 200)] * LAST
    lines = []
    for step, devices, train_steps in (
        (0, 8, 200),
        (6, 8, 200),  # unchanged
        (6, 4, 200),
        (10, 4, 300),  # another schedule
        (3, 4, 300),  # later checkpoints were bad: the same settings from an earlier step on
        (12, 8, 200),
        (12, 8, 200),
    ):
        begins(step, devices, train_steps)
        expected[step:] = [(devices, train_steps)] * (LAST - step)
        assert taken(tmp_path) == expected
        lines.append(len(read_settings(tmp_path)))
    assert lines == [1, 1, 2, 3, 4, 5, 5]
    settings_go_back(tmp_path, 9)
    expected[9:] = [(8, 200)] * (LAST - 9)
    assert taken(tmp_path) == expected
    settings_go_back(tmp_path, 14)
    assert len(read_settings(tmp_path)) == 6

    begins(14, 8, 300)
    history = read_settings(tmp_path)
    assert [segment.last for segment in replay.split_segments(history, 9, 17)] == [14, 17]
    with pytest.raises(UserError, match="Step 3 used 8 devices, the next step used 4"):
        replay.split_segments(history, 2, 11)


def test_a_run_that_an_older_version_began(tmp_path, begins):
    begins(7, 4)
    assert settings_at(read_settings(tmp_path), 8).devices == 4
    with pytest.raises(UserError, match=r"does not record the devices .* step 7 ran"):
        settings_at(read_settings(tmp_path), 7)


def test_a_flight_record_has_the_settings_before_the_run_went_on_with_others(tmp_path, begins):
    begins(0, 8)
    path = tmp_path / "flight" / "9" / "record.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"history": [{"step": 9}], "rewinds": 0, "settings": 1}))
    begins(6, 4)
    now = replay.read_log(tmp_path)
    assert [settings_at(now.settings, step).devices for step in (6, 9)] == [8, 4]
    then = replay.read_flight(tmp_path, 9, now)
    assert [settings_at(then.settings, step).devices for step in (6, 9)] == [8, 8]
    assert (now.last_usable_step, then.last_usable_step) == (
        math.inf,
        6,
    )  # a later checkpoint has other bits


@pytest.mark.parametrize(
    "change",
    [
        {"after": -1},
        {"after": "0"},
        {"after": True},
        {"config": []},
        {"devices": 0},
        {"devices": 2**40},
        {"processes": None},
        {"versions": 3},
        {"more": 1},
    ],
)
def test_a_damaged_line_is_named(tmp_path, begins, change):
    begins(0, 8)
    begins(4, 4)
    first, second = (tmp_path / SETTINGS).read_text().splitlines()
    changed = sealed(unsealed(json.loads(second)) | change)
    (tmp_path / SETTINGS).write_text(f"{first}\n{json.dumps(changed)}\n")
    with pytest.raises(UserError, match=rf"{SETTINGS} is damaged in line 2: restore it"):
        read_settings(tmp_path)


def test_a_changed_number_is_found_by_the_seal(tmp_path, begins):
    begins(0, 8)
    begins(4, 4)
    path = tmp_path / SETTINGS
    path.write_text(path.read_text().replace('"after": 4', '"after": 6'))
    with pytest.raises(UserError, match=rf"{SETTINGS} is damaged in line 2: restore it"):
        read_settings(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "7", "[" * 100_000, "\udcff"])
def test_so_is_one_that_is_no_line(tmp_path, text):
    (tmp_path / SETTINGS).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="damaged in line 1"):
        read_settings(tmp_path)


def test_what_another_machine_would_round_otherwise_is_refused(tmp_path, begins):
    begins(0, 8)
    (settings,) = read_settings(tmp_path)
    for change, sentence in (
        ({"platform": "tpu"}, "used 8 devices of kind tpu, and cpu rounds differently"),
        ({"devices": 16}, r"used 16 devices, and 8 devices .*--devices=16"),
    ):
        other = cast(Settings, dataclasses.replace(settings, **change))
        with pytest.raises(UserError, match=sentence):
            replay._prepared(other, tmp_path)


def test_the_config_of_a_version_with_another_name_for_a_key_is_read(tmp_path, begins):
    begins(0, 1)
    path = tmp_path / SETTINGS
    line = json.loads(path.read_text())
    line.pop(SEAL)  # that version wrote no seal
    del line["config"]["eval"]["rows"]
    line["config"]["eval"]["batches"] = 3
    path.write_text(json.dumps(line) + "\n")
    assert read_settings(tmp_path)[0].typed().eval.rows == 3 * Config().train.batch_size
