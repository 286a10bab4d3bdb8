"""Scheduling of benchmark jobs on devices, and the GPU report; no benchmark is run."""

import dataclasses
import os
import sys
import threading
from pathlib import Path

import pytest

from benchmarks.gpu import profile_rows, report, step_rows
from benchmarks.gpu_parts import EVEN, PARTS, Given, Step, jobs_of
from benchmarks.jobs import Job, Outcome, last_json, last_table, run, run_job, schedule
from benchmarks.peers.compare import parse

ROOT = Path(__file__).resolve().parents[1]
DONE = Outcome("", 1.0, ())


def never(line: str) -> None:
    """Ignore lines of progress."""


def job(name: str, devices: int = 1, alone: bool = False) -> Job:
    return Job(name, (), devices, alone)


def test_jobs_run_side_by_side_each_on_its_own_devices():
    both, seen = threading.Barrier(2, timeout=20), {}

    def work(job, taken):
        seen[job.name] = list(taken)
        if job.name in "ab":
            both.wait()  # passes only if both jobs run at the same time
        return DONE

    kept = []
    jobs = [job("wide", 2), job("a"), job("b")]
    outcomes = schedule(jobs, ["5", "7"], work, never, lambda found: kept.append(len(found)))
    assert kept == [1, 2, 3]
    assert list(outcomes) == ["wide", "a", "b"]
    assert seen["wide"] == ["5", "7"]
    assert sorted(seen["a"] + seen["b"]) == ["5", "7"]


def test_alone_means_last_and_beside_nobody():
    busy, beside, order, begun = set(), {}, [], threading.Event()

    def work(job, taken):
        order.append(job.name)
        busy.add(job.name)
        beside[job.name] = len(busy) - 1
        if job.name == "first":
            begun.set()
        if job.name == "b":
            begun.wait(0.2)  # long enough that a wrongly early `first` would begin
        busy.remove(job.name)
        return DONE

    schedule([job("first", alone=True), job("a"), job("b")], ["0", "1"], work, never)
    assert order[-1] == "first" and beside["first"] == 0


def test_too_few_devices_fail_one_job_only():
    outcomes = schedule([job("wide", 2), job("a")], ["0"], lambda job, taken: DONE, never)
    assert outcomes["wide"].error == "needs 2 devices, here are 1"
    assert outcomes["a"] == DONE


def test_processes(tmp_path):
    ends = {
        "good": ("print(7)", 20.0),
        "bad": ("import sys; sys.exit('all wrong')", 20.0),
        "slow": ("import threading; threading.Event().wait()", 0.2),
    }
    found = {
        name: run([sys.executable, "-S", "-c", code], os.environ, seconds, tmp_path / name)
        for name, (code, seconds) in ends.items()
    }
    assert found["good"] == ("", "7\n")
    assert found["bad"][0] == "exit code 1, all wrong"
    assert found["slow"][0] == "not done after 0.2 s"
    assert run(["/nowhere/at-all"], os.environ, 2.0, tmp_path / "none")[0].startswith("not started")


def test_a_failed_command_ends_its_job(tmp_path):
    fails, prints = (
        (sys.executable, "-S", "-c", code) for code in ("raise SystemExit(3)", "print(1)")
    )
    outcome = run_job(Job("two", (fails, prints)), os.environ, 20.0, tmp_path)
    assert outcome.error.startswith("exit code 3") and len(outcome.outputs) == 1
    assert not (tmp_path / "two-1.out").exists()


def test_last_json_and_table():
    text = '| a |\n| - |\n\n{"x": 1}\n{"x": 2}\n| b |\n| - |\n| 1 |\nend\n'
    assert last_json(text) == {"x": 2} and last_json("no") is None
    assert last_table(text) == "| b |\n| - |\n| 1 |" and last_table("no") == ""


@pytest.fixture
def given() -> Given:
    configs = ("configs/bench_mixtral_2b.py", "configs/bench_olmoe_half.py")
    return Given(configs, (4, 8), 8, 20, (), False, Path("scratch"))


def test_parts_share_what_they_compare_with(given):
    jobs = jobs_of(PARTS, given)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    assert all(job.against in names for job in jobs if isinstance(job, Step) and job.against)
    alone = {job.name for job in jobs_of(["deterministic"], given)}
    assert alone == {
        f"{config}-dropless-8{also}"
        for config in ("mixtral_2b", "olmoe_half")
        for also in ("", "-deterministic")
    }
    batches = [
        command
        for job in jobs_of(["two"], given)
        if job.devices == 2
        for command in job.commands[0]
        if "batch_size" in command
    ]
    assert set(batches) == {"--config.train.batch_size=16"}


def test_like_is_compared_with_like(given):
    """Both sides of a ratio need the same router load, or the ratio would measure the load."""
    jobs = {job.name: job for job in jobs_of(PARTS, given) if isinstance(job, Step)}

    def load(job):
        return {part for part in job.commands[0] if part == "--random" or "router=" in part}

    pairs = [(job, jobs[job.against]) for job in jobs.values() if job.against]
    assert all(load(job) == load(unit) for job, unit in pairs)
    assert "--random" in EVEN  # no hash table spreads text evenly over experts
    shifted = [job.name for job, _ in pairs if load(job) == set(EVEN)]
    assert len(shifted) == 2 * (
        2 + 1
    )  # per config: capacity at two batch sizes, and experts on two GPUs
    meshes = {name.partition("8x2-")[2] for name in jobs if "8x2" in name}
    assert meshes == {"data-random", "fsdp-random", "expert-random", "expert-even"}
    assert {"mixtral_2b-dropless-16-random", "olmoe_half-dropless-16-even"} < set(jobs)  # losses


def test_the_peers_part_is_what_compare_takes(given):
    jobs = jobs_of(["peers"], given)
    assert not jobs_of(["peers"], dataclasses.replace(given, small=True))
    asked = [parse(job.commands[0][3:]) for job in jobs]
    assert all(overrides == [] and found.rounds == 1 for found, overrides in asked)
    found = [(Path(one.configs[0]).stem, one.batches, one.steps) for one, _ in asked]
    names = "bench_mixtral_2b", "bench_olmoe_half"
    assert found == [(name, [batch], 20) for name in names for batch in (4, 8)]
    assert all(
        job.commands[0][:3] == (sys.executable, "-m", "benchmarks.peers.compare") for job in jobs
    )


def test_a_process_over_its_time_takes_its_own_with_it(tmp_path):
    """A forgotten child that still uses a GPU would distort the next measurement."""
    child = "import os, threading; print(os.getpid(), flush=True); threading.Event().wait()"
    parent = (
        "import pathlib, sys; from benchmarks.jobs import end_with_children, run;"
        f"end_with_children(); log = pathlib.Path({str(tmp_path / 'child')!r});"
        f"run([sys.executable, '-S', '-c', {child!r}], {{}}, 600, log)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    error, _ = run([sys.executable, "-S", "-c", parent], env, 5.0, tmp_path / "parent")
    assert error == "not done after 5 s"
    number = int((tmp_path / "child.out").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


ROW = {
    "step_ms": 100.0,
    "model_tflops_per_s": 500.0,
    "tokens_per_s": 1000,
    "peak_memory_mib": 2048,
    "loss": 2.0,
    "drop_fraction": 0.0,
    "profile_ms": {"experts": 60.0, "idle": 1.0},
}


def test_report():
    steps = [Step("one", ()), Step("two", (), against="one"), Step("lost", (), against="one")]
    rows = {"one": ROW, "two": {**ROW, "tokens_per_s": 1950, "profile_ms": {"collectives": 9.0}}}
    rows["two"]["collectives_sent_mb"] = 4200.0
    heading, one, two, lost = step_rows(steps, rows)
    assert len({len(line) for line in (heading, one, two, lost)}) == 1
    assert one[-2:] == ["-", "-"] and two[-2:] == ["1.950", "one"] and lost[1] == "failed"
    assert profile_rows(rows) == [
        ["job", "experts", "collectives", "idle", "collectives beside other kernels", "sent, MB"],
        ["one", "60.0", "-", "1.0", "0.0", "0.0"],
        ["two", "-", "9.0", "-", "0.0", "4200.0"],
    ]
    start = Job("start", (("a",), ("a",)))
    cold = '{"first_step_seconds": 60.0, "compile_seconds": 50.0}'
    outcomes = dict.fromkeys(["one", "two", "lost"], Outcome("exit code 1, out of memory", 3.0, ()))
    text = report([*steps, start], {**outcomes, "start": Outcome("killed", 70.0, (cold, ""))})
    assert "out of memory" in text and "| start |" in text and "60.0" in text
