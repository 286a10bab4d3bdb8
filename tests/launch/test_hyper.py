"""Combinations of runs, against cases worked out by hand."""

import pytest

from launch import hyper
from launch.shell import LaunchError

A = [{"a": 1}, {"a": 2}]
B = [{"b": 3}, {"b": 4}, {"b": 5}]


def test_one_key():
    assert hyper.sweep("a", [1, 2]) == A
    assert hyper.sweep("a", range(2)) == [{"a": 0}, {"a": 1}]
    assert hyper.sweep("a", []) == []
    assert hyper.fixed("a", 1) == [{"a": 1}]
    assert hyper.fixed("a", 1, length=2) == [{"a": 1}, {"a": 1}]


def test_product_varies_the_last_list_fastest():
    assert hyper.product([A, B]) == [
        {"a": 1, "b": 3},
        {"a": 1, "b": 4},
        {"a": 1, "b": 5},
        {"a": 2, "b": 3},
        {"a": 2, "b": 4},
        {"a": 2, "b": 5},
    ]
    assert hyper.product([A]) == A
    assert hyper.product([]) == [{}]
    assert hyper.product([A, []]) == []


def test_zip_takes_runs_side_by_side():
    assert hyper.zipit([A, [{"b": 3}, {"b": 4}]]) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    assert hyper.zipit([A, hyper.fixed("c", 9)]) == [{"a": 1, "c": 9}, {"a": 2, "c": 9}]
    assert hyper.zipit([hyper.fixed("b", 3), hyper.fixed("c", 9)]) == [{"b": 3, "c": 9}]
    assert hyper.zipit([]) == []
    assert hyper.zipit([[], hyper.fixed("c", 9)]) == []


def test_zip_refuses_other_lengths():
    with pytest.raises(LaunchError, match=r"lists of 2 and 3 runs"):
        hyper.zipit([A, B])


def test_chain_appends():
    assert hyper.chainit([A, B]) == [{"a": 1}, {"a": 2}, {"b": 3}, {"b": 4}, {"b": 5}]
    assert hyper.chainit([]) == []


def test_nesting():
    """Seeds x (one dense run, or sparse runs whose width halves as their experts double)."""
    sparse = hyper.zipit([hyper.sweep("e", [8, 16]), hyper.sweep("f", [64, 32])])
    runs = hyper.product(
        [hyper.sweep("seed", [0, 1]), hyper.chainit([hyper.fixed("d", True), sparse])]
    )
    assert runs == [
        {"seed": 0, "d": True},
        {"seed": 0, "e": 8, "f": 64},
        {"seed": 0, "e": 16, "f": 32},
        {"seed": 1, "d": True},
        {"seed": 1, "e": 8, "f": 64},
        {"seed": 1, "e": 16, "f": 32},
    ]


@pytest.mark.parametrize("combine", [hyper.product, hyper.zipit])
def test_a_key_is_set_once(combine):
    assert combine([[{"a": 1}], [{"a": 1, "b": 2}]]) == [{"a": 1, "b": 2}]
    with pytest.raises(LaunchError, match="a is 1 in one part of a run and 2 in another"):
        combine([[{"a": 1}], [{"a": 2}]])


def test_parts_are_not_changed():
    """A list may be used in several places of a sweep file."""
    hyper.product([A, B])
    hyper.zipit([A, hyper.fixed("c", 9)])
    assert A == [{"a": 1}, {"a": 2}]
