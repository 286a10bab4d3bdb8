"""Formatting of numbers, sizes and durations for people."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.files import formats


@pytest.mark.parametrize(
    ("number", "digits", "text"),
    [
        (0, 1, "0"),
        (999, 1, "999"),
        (1000, 1, "1.0k"),
        (21_300, 1, "21.3k"),
        (7_510_528, 2, "7.51M"),
        (46.7e9, 1, "46.7G"),
        (1.6e12, 2, "1.60T"),
        (5e15, 1, "5000.0T"),
    ],
)
def test_counts(number, digits, text):
    assert formats.count(number, digits) == text


@pytest.mark.parametrize(
    ("number", "digits", "text"),
    [
        (0, 2, "0.00 MiB"),
        (5 * 2**19, 1, "2.5 MiB"),
        (2**30 - 1, 2, "1024.00 MiB"),
        (2**30, 2, "1.00 GiB"),
        (2**41, 2, "2.00 TiB"),
        (2**51, 1, "2048.0 TiB"),
    ],
)
def test_sizes(number, digits, text):
    assert formats.size(number, digits) == text


@pytest.mark.parametrize(
    ("seconds", "whole", "largest_two"),
    [
        (3.14, "3.1s", "3.1s"),
        (60, "1m00s", "1m00s"),
        (80, "1m20s", "1m20s"),
        (4000, "1h06m40s", "1h06m"),
        (86_400, "1d00h00m00s", "1d00h"),
        (10 * 86_400 + 4000.4, "10d01h06m40s", "10d01h"),
    ],
)
def test_durations(seconds, whole, largest_two):
    assert formats.duration(seconds) == whole
    assert formats.duration(seconds, units=2) == largest_two


@settings(max_examples=200, derandomize=True, database=None)
@given(st.integers(60, 10**9))
def test_a_duration_adds_up(seconds):
    lengths = {"d": 86_400, "h": 3600, "m": 60, "s": 1}
    parts = re.findall(r"(\d+)([dhms])", formats.duration(seconds))
    assert sum(int(number) * lengths[unit] for number, unit in parts) == seconds


@pytest.mark.parametrize(("value", "text"), [(0, "0.0%"), (0.125, "12.5%"), (None, "-"), ("", "-")])
def test_what_is_no_number_is_a_dash(value, text):
    assert formats.or_dash(value, "{:.1%}".format) == text


def test_gibibytes_of_a_column():
    assert [formats.gib(number) for number in (0, 2**29, 2**31, 1.5 * 2**41)] == [
        "0.0",
        "0.5",
        "2.0",
        "3072.0",
    ]


def test_epochs_of_one_stream_of_a_few_and_of_many():
    assert formats.epochs({"text": 0.1234}) == ["epoch 0.12"]
    assert formats.epochs({"web": 0.5, "code": 1.304}) == ["epoch web 0.50 code 1.30"]
    assert formats.epochs({name: i for i, name in enumerate("abcd")}) == ["epoch 0.00 to 3.00"]
    assert formats.epochs(None) == formats.epochs({}) == []
