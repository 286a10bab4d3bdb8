"""Untrusted JSON values become typed records, or are refused with the number of their line."""

import dataclasses
import json
from typing import Any

import pytest
from garbage import changed_json
from hypothesis import given, settings

from moe_jax.files import records


@dataclasses.dataclass(frozen=True)
class Sample:
    step: int
    span: tuple[int, int]
    why: str
    done: bool
    knobs: dict[str, Any]


ROW = {"step": 3, "span": [0, 2**53 - 1], "why": "é", "done": False, "knobs": {"a": [None]}}


def sample(value: Any) -> Sample:
    return records.typed(Sample, value)


def test_a_record_has_the_types_of_its_fields():
    assert sample(ROW) == Sample(3, (0, 2**53 - 1), "é", False, {"a": [None]})


@pytest.mark.parametrize(
    "change",
    [
        {"step": True},
        {"step": 3.0},
        {"step": -1},
        {"step": 2**53},
        {"step": "3"},
        {"span": [0]},
        {"span": [0, 1, 2]},
        {"span": [0, True]},
        {"span": {"0": 0, "1": 1}},
        {"why": None},
        {"done": 0},
        {"knobs": [["a", 1]]},
        {"more": 1},
    ],
)
def test_a_field_of_another_type_is_refused(change):
    with pytest.raises(ValueError):
        sample(ROW | change)


@pytest.mark.parametrize("name", ROW)
def test_a_missing_field_is_refused(name):
    with pytest.raises(ValueError, match="fields"):
        sample({key: value for key, value in ROW.items() if key != name})


@settings(max_examples=200, derandomize=True, database=None)
@given(changed_json(ROW))
def test_garbage_is_a_record_or_none(raw):
    found = records.parse_line(raw, sample)
    if found is not None:
        assert type(found.step) is type(found.span[1]) is int and found.step >= 0
        assert type(found.why) is str and type(found.done) is bool


def test_the_damaged_line_is_counted_from_one():
    good = json.dumps(ROW)
    lines = records.parse_lines([good, good.encode(), "[]", "{"], sample)
    assert [next(lines).step for _ in range(2)] == [3, 3]
    with pytest.raises(records.LineError, match="not an object") as damaged:
        next(lines)
    assert damaged.value.number == 3


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), -0.5, 1.5, True, "1", None, pytest.param(10**400, id="huge")],
)
def test_a_number_out_of_range_is_refused(value):
    with pytest.raises(ValueError):
        records.number(value, 1.0)
    assert records.number(1, 1.0) == 1.0


@pytest.mark.parametrize("value", [None, "ab", ["a", 1], {"a": "b"}])
def test_names_are_a_list_of_texts(value):
    with pytest.raises(ValueError):
        records.names(value)
    assert records.names(["a", ""]) == ["a", ""]
