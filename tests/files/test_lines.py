"""Appended files hold whole records even if the disk fills up and recovers."""

import json
import os

import pytest
from no_room import no_room

from moe_jax.files.lines import GrowingFile, JsonLinesWriter


def numbers(path) -> list[int]:
    return [json.loads(line)["n"] for line in path.read_bytes().splitlines()]


@pytest.mark.parametrize("leave", [0, 1, 8, 9, 10, 12, 17, 18, 20])
def test_a_disk_that_fills_anywhere_in_a_record_costs_no_record(tmp_path, leave):
    """A full disk writes the first bytes of a record and refuses the rest."""
    path, said = tmp_path / "a", []
    lines = JsonLinesWriter(path, said.append)
    for n in range(6):
        if n == 4:
            assert len(said) == 2
        with no_room(10**6 if n in (0, 4, 5) else leave):  # each row takes 9 bytes
            lines.append({"n": n})
            kept = path.read_bytes().splitlines(keepends=True)
            assert all(json.loads(line) for line in kept if line.endswith(b"\n"))
        if n == 3:
            lines.append({"n": 9})
    lines.close()
    assert numbers(path) == [0, 1, 2, 3, 9, 4, 5]
    assert [str(path) in line for line in said] == [True, True]
    assert "make room" in said[0] and said[1].endswith("is written again.")


@pytest.mark.parametrize("leave", [0, 9, 12, 17, 18, 19, 24])
def test_a_record_takes_the_place_of_the_last_one(tmp_path, leave):
    """A disk that fills during the overwrite loses neither record; a shorter one is padded."""
    path, said = tmp_path / "a", []
    lines = JsonLinesWriter(path, said.append)
    lines.append({"n": 1})
    lines.append({"n": 2})
    lines.replace_last({"n": 300})
    assert numbers(path) == [1, 300]
    lines.replace_last({"n": 4})
    assert numbers(path) == [1, 4]
    with no_room(leave):
        lines.replace_last({"n": 555_555})
    assert numbers(path)[:2] in ([1, 4], [1, 555_555])
    lines.replace_last({"n": 6})
    lines.append({"n": 7})
    lines.close()
    assert numbers(path) == ([1, 6, 7] if leave == 24 else [1, 4, 555_555, 6, 7])


def test_what_another_process_wrote_is_not_replaced(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b'{"n": 1}\n')
    lines = JsonLinesWriter(path, print)
    lines.replace_last({"n": 2})
    lines.replace_last({"n": 3})
    assert numbers(path) == [1, 3]


def test_what_waits_is_bounded_and_what_is_lost_is_counted(tmp_path):
    path, said = tmp_path / "a", []
    lines = JsonLinesWriter(path, said.append, keep=3)
    with no_room():
        for n in range(5):
            lines.append({"n": n})
    lines.append({"n": 5})
    assert numbers(path) == [3, 4, 5]
    assert said[1].endswith("is written again, without 3 records.")
    with no_room():
        lines.append({"n": 6})
        lines.close()
    assert said[-1] == f"{path}: 1 records are lost."


def test_a_record_that_a_kill_has_torn_stays_apart(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b'{"n": 1}\n{"n"')
    lines = JsonLinesWriter(path, print)
    lines.append({"n": 2})
    assert path.read_bytes() == b'{"n": 1}\n{"n"\n{"n": 2}\n'


@pytest.mark.parametrize(
    ("held", "end", "found"),
    [(b"", b"\n", True), (b"x\n", b"\n", True), (b"x", b"\n", False), (b"x", b"longer", False)],
)
def test_how_a_file_ends(tmp_path, held, end, found):
    (tmp_path / "a").write_bytes(held)
    assert GrowingFile(tmp_path / "a", print).ends_with(end) == found


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError):
        JsonLinesWriter(tmp_path / "pipe", print)
