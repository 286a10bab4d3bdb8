"""Processes of a run that were not started alike all report it, and none of them trains."""

import subprocess

import hypothesis
import pytest
from hypothesis import strategies as st
from small_run import ONE_LAYER, flags, write_corpus

from moe_jax.record.lock import lock_workdir
from moe_jax.run.agree import NAMED, difference

VALUES = st.one_of(st.integers(0, 3), st.booleans(), st.text(max_size=3), st.none())
KEYS = [f"config.{name}" for name in "abcdef"]


@hypothesis.given(st.data(), st.integers(2, 5))
def test_what_differs_is_named_with_values_and_processes(data, processes):
    everyone = [
        {key: data.draw(VALUES) for key in KEYS if data.draw(st.integers(0, 5))}
        for _ in range(processes)
    ]
    said = difference(everyone)
    # JSON distinguishes true from 1; Python does not.
    values = {key: [repr(one[key]) if key in one else "" for one in everyone] for key in KEYS}
    different = [key for key in KEYS if len(set(values[key])) > 1]
    named = [key for key in KEYS if f"{key} is " in said]
    assert set(named) <= set(different) and len(named) == min(NAMED, len(different))
    assert (said == "") == (not different)
    for key in named:
        part = said.split(f"{key} is ")[1].split(", config.")[0].split(", and ")[0]
        for process, value in enumerate(values[key]):
            holders = [p for p, other in enumerate(values[key]) if other == value]
            which = ", ".join(map(str, holders))
            many = "es" if len(holders) > 1 else ""
            assert f"{value or 'not set'} on process{many} {which}" in part, (process, key)
    if len(different) > NAMED:
        assert f"and {len(different) - NAMED} more differ" in said


# One of two hosts has a different package version and a different JAX setting.
OTHER_JAX = """
import sys
import jax
import moe_jax.run.agree
from moe_jax.cli.exit import run
from moe_jax.cli.train import main

if "--process_id=1" in sys.argv:
    jax.config.update("jax_threefry_partitionable", False)
    found = moe_jax.run.agree.package_versions()
    moe_jax.run.agree.package_versions = lambda: found | {"jaxlib": "0.0.1"}
sys.argv[0] = "moe_jax train"
run(main)
"""
# The same relative path in two folders, as two hosts may have different disks under one name.
OTHER_BYTES = """
import os, sys
from moe_jax.cli.exit import run
from moe_jax.cli.train import main

os.chdir("second" if "--process_id=1" in sys.argv else "first")
sys.argv[0] = "moe_jax train"
run(main)
"""
TRAIN = ("-m", "moe_jax", "train")
SMALL = ONE_LAYER | {"model.width": 16, "train.steps": 2, "eval.samples": 0, "mesh.data": 4}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("agree") / "text")


@pytest.fixture
def two(pair, tmp_path, files):
    """`two([], ["--config.seed=1"])`: results of two processes with these additional flags."""

    def run(first=(), second=(), program=TRAIN):
        given = flags(tmp_path / "run", files, **SMALL)
        return ended(pair(given, program, each=(list(first), list(second))))

    return run


def ended(started: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Exit code and standard error of each."""
    said = [one.communicate(timeout=120) for one in started]
    return [(one.returncode, err) for one, (_, err) in zip(started, said, strict=True)]


def sentences(ends: list[tuple[int, str]]) -> set[str]:
    """The message of every process; checks that each ended with 1."""
    assert [code for code, _ in ends] == [1] * len(ends), ends
    said = [[line for line in err.splitlines() if line.startswith("Error: ")] for _, err in ends]
    assert all(len(one) == 1 for one in said), said
    assert not any("Traceback" in err or "***" in err for _, err in ends), ends
    return {one for [one] in said}


@pytest.mark.parametrize(
    "different",
    [
        {
            "model.moe.capacity_factor": (1.25, 2.0),
            "optimizer.learning_rate": (0.01, 0.02),
            "eval.every": (0, 3),
        },
        pytest.param({"train.steps": (2, 4)}, marks=pytest.mark.lifecycle),
    ],
)
def test_other_values_on_one_process(two, tmp_path, different):
    each = ([f"--config.{key}={value[i]}" for key, value in different.items()] for i in (0, 1))
    [said] = sentences(two(*each))
    for key, (here, there) in different.items():
        assert f"config.{key} is {here} on process 0 and {there} on process 1" in said
    assert said.endswith(": start all processes with the same command, packages and environment.")
    assert not (tmp_path / "run").exists()


@pytest.mark.lifecycle
def test_another_flag_and_another_package(two, tmp_path):
    [said] = sentences(two(["--init_from=here"], ["--init_from=there"], ("-c", OTHER_JAX)))
    assert "--init_from is 'here' on process 0 and 'there' on process 1" in said
    assert "the version of jaxlib is '" in said and "' on process 0 and '0.0.1' on process" in said
    assert "JAX_THREEFRY_PARTITIONABLE is 'True' on process 0 and 'False' on process 1" in said
    assert not (tmp_path / "run").exists()


def test_a_mistake_on_one_process_alone(two, tmp_path):
    """Both processes end with 1, whichever of them has the mistake."""
    wrong = ["--config.model.moe.top_k=99"]
    for first, second in ((wrong, []), ([], wrong)):
        said = sentences(two(first, second))
        assert all("model.moe.top_k is 99 with 8 experts: set top_k" in one for one in said)
        assert any(
            f"Process {int(second == wrong)} of this run cannot go on" in one for one in said
        )
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("process", "wrong"),
    [
        (1, "--config.train.stepz=3"),
        pytest.param(0, "--config=configs/no_such_file.py", marks=pytest.mark.lifecycle),
        pytest.param(1, "--process_idd=1", marks=pytest.mark.lifecycle),
    ],
)
def test_a_command_line_that_one_process_alone_cannot_read(two, process, wrong):
    said = sentences(two(*([wrong] if each == process else [] for each in (0, 1))))
    assert any(f"Process {process} of this run cannot go on" in one for one in said)
    assert len(said) == 2


@pytest.mark.lifecycle
def test_other_bytes_under_the_same_path(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, documents in (("first", 64), ("second", 66)):
        write_corpus(tmp_path / name / "text", documents)
    given = flags(tmp_path / "run", "text/*.txt", **SMALL)
    [said] = sentences(ended(pair(given, ("-c", OTHER_BYTES))))
    assert "the fingerprint of the text (data.files, data.mixture) is '" in said
    assert "the number of documents is 64 on process 0 and 66 on process 1" in said
    assert "give all processes the same files" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.lifecycle
def test_a_workdir_in_use_ends_both(two, tmp_path):
    with lock_workdir(tmp_path / "run"):
        said = sentences(two())
    assert all("is in use by process" in one for one in said)
