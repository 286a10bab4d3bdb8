"""Tests launch.supervise and its command as real processes."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launch import supervise
from moe_jax.checkpoint import Checkpoints

# A stand-in for the trainer.  Start N follows the N-th entry of the plan: it commits checkpoints,
# logs steps, then ends with a code, or by a signal if that is negative.
STAND_IN = """
import json, os, sys
from pathlib import Path
plan, workdir = json.loads(sys.argv[1]), Path(sys.argv[2].partition("=")[2])
with open(workdir / "starts", "a+") as file:
    file.write("x")
    file.seek(0)
    now = plan[len(file.read()) - 1]
for step in now.get("aside", []):
    (workdir / "checkpoints" / str(step)).rename(workdir / f"aside-{step}")
if "back" in now:
    (workdir / "rewinds.jsonl").write_text("".join(f"{json.dumps(row)}\\n" for row in now["back"]))
for step in now.get("saved", []):
    folder = workdir / "checkpoints" / str(step)
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()
    (folder / "commit_success.txt").touch()
for step in now.get("logged", []):
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step}) + "\\n")
if now["end"] < 0:
    os.kill(os.getpid(), -now["end"])
sys.exit(now["end"])
"""
# Prints "ready" once it can be stopped; ends with 42 after SIGTERM, with 9 after SIGINT.
WAITING = """
import os, signal
def stop(*_):
    print("saved", flush=True)
    os._exit(42)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, lambda *_: os._exit(9))
signal.alarm(60)  # ends the process even if the test fails
print("ready", flush=True)
while True:
    signal.pause()
"""
ENDS = 20  # seconds that a process may take to end


def arguments(plan, workdir: Path, *options: str) -> list[str]:
    stand_in = [sys.executable, "-I", "-S", "-c", STAND_IN, json.dumps(plan)]
    return [*options, "--", *stand_in, f"--workdir={workdir}"]


def starts(workdir: Path) -> int:
    return len((workdir / "starts").read_text())


def follow(*given: str) -> subprocess.Popen[str]:
    """Start the supervisor in its own process group, as a terminal does."""
    return subprocess.Popen(
        [sys.executable, "-S", "-m", "launch.supervise", *given],
        cwd=Path(supervise.__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def waits(monkeypatch):
    """The seconds of each wait between two starts; no time passes."""
    seconds: list[float] = []
    monkeypatch.setattr(supervise.select, "select", lambda *given: seconds.append(given[3]))
    return seconds


# ---- when it restarts the command and when it does not


def test_it_restarts_what_can_go_on(tmp_path, waits, capfd):
    plan = [{"end": end} for end in (42, 134, 137, 143, -signal.SIGKILL, -signal.SIGSEGV, 0)]
    assert supervise.main(arguments(plan, tmp_path, "--max_stuck=6")) == 0
    assert starts(tmp_path) == 7
    reasons = re.findall(r"^\S+ restart \d: (.*); reached", capfd.readouterr().out, re.MULTILINE)
    assert reasons == [
        "asked to be run again (exit code 42)",
        "ended by SIGABRT (exit code 134)",
        "ended by SIGKILL (exit code 137)",
        "ended by SIGTERM (exit code 143)",
        "killed by SIGKILL",
        "killed by SIGSEGV",
    ]


@pytest.mark.parametrize("code", [0, 1, 3, 2])
def test_other_codes_are_handed_on_at_once(tmp_path, waits, capfd, code):
    assert supervise.main(arguments([{"end": code}], tmp_path)) == code
    assert (starts(tmp_path), waits, capfd.readouterr().out) == (1, [], "")


def test_it_gives_up_without_later_checkpoints(tmp_path, waits, capfd):
    """Steps that are lost again at each restart are no progress."""
    plan = [{"end": 137, "logged": [start]} for start in range(9)]
    assert supervise.main(arguments(plan, tmp_path, "--max_stuck=3")) == 1
    assert starts(tmp_path) == 4
    assert "giving up: ended by SIGKILL (exit code 137); reached step 3" in capfd.readouterr().out


def test_progress_starts_the_count_and_the_waits_over(tmp_path, waits, capfd):
    plan = [
        {"end": 137, "saved": [10], "logged": [10, 17]},
        {"end": 137},
        {"end": 42},
        {"end": 42, "saved": [20], "logged": [20]},
        {"end": 42},
        {"end": 137},
        {"end": 137},
    ]
    given = ("--max_stuck=3", "--wait=4", "--max_wait=7")
    assert supervise.main(arguments(plan, tmp_path, *given)) == 1
    assert waits == [4, 7, 7, 0, 4, 7]
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].endswith("reached step 17, resumes from 10, 7 steps lost, waiting 4 s")
    assert lines[3].endswith("reached step 20, resumes from 20, 0 steps lost, waiting 0 s")
    assert starts(tmp_path) == 7


def test_checkpoints_of_before_are_no_progress(tmp_path, waits):
    step = tmp_path / "checkpoints" / "50"
    step.mkdir(parents=True)
    for name in ("manifest.json", "commit_success.txt"):
        (step / name).touch()
    assert supervise.main(arguments([{"end": 42}] * 9, tmp_path, "--max_stuck=1")) == 1
    assert starts(tmp_path) == 2


def test_going_back_past_bad_batches_starts_the_count_over(tmp_path, waits, capfd):
    """After a rewind, checkpoints before the earlier newest one count as progress."""
    half_way = {"step": 20, "settled": False}
    plan = [
        {"end": 137, "saved": [10, 20, 30]},
        {"end": 137},
        {"end": 137, "back": [half_way]},  # killed before 30 was quarantined
        {"end": 137, "aside": [30], "back": [half_way | {"settled": True}]},
        {"end": 137, "saved": [25]},
        {"end": 137},
        {"end": 137},
    ]
    assert supervise.main(arguments(plan, tmp_path, "--max_stuck=2")) == 1
    lines = capfd.readouterr().out.splitlines()
    froms = re.findall(r"resumes from (\d+)", "\n".join(lines))
    assert froms == ["30", "30", "20", "20", "25", "25"]
    assert (starts(tmp_path), len(lines)) == (7, 7)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--workdir=x"], "There is nothing to run"),
        (["--", "true"], "--workdir is missing"),
        (["--workdir=x", "--", "no-such-program"], "no program 'no-such-program'"),
        (["--max_stuck=0", "--workdir=x", "--", "true"], "--max_stuck=0 is too small"),
    ],
)
def test_mistakes_are_refused_in_a_sentence(given, sentence):
    with pytest.raises(supervise.LaunchError, match=sentence):
        supervise.main(given)


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_command_once_as_sigterm(tmp_path, number):
    """Ctrl-C signals the whole group; the command must get only the supervisor's SIGTERM."""
    process = follow(f"--workdir={tmp_path}", "--", sys.executable, "-S", "-c", WAITING)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=ENDS)
    assert (process.returncode, out) == (42, "saved\n")  # and was not restarted


def test_a_signal_ends_the_wait(tmp_path):
    process = follow(*arguments([{"end": -9}, {"end": 0}], tmp_path, "--wait=100"))
    assert process.stdout is not None and " waiting 100 s" in process.stdout.readline()
    process.terminate()
    process.communicate(timeout=ENDS)
    assert (process.returncode, starts(tmp_path)) == (137, 1)


def test_the_command_is_stopped_if_the_supervisor_is_killed(tmp_path):
    process = follow(f"--workdir={tmp_path}", "--", sys.executable, "-S", "-c", WAITING)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.kill()
    out, _ = process.communicate(timeout=ENDS)  # until the command closes its stdout
    assert (process.returncode, out) == (-signal.SIGKILL, "saved\n")


def test_the_command_ignores_no_signal_that_it_would_not_otherwise(tmp_path):
    command = ["grep", "SigIgn", "/proc/self/status"]
    plain = subprocess.run(command, capture_output=True, text=True).stdout
    process = follow(f"--workdir={tmp_path}", "--", *command)
    supervised = process.communicate(timeout=ENDS)[0]
    # Masks of ignored signals.  The supervisor handles SIGTERM and SIGINT, so its command gets
    # their defaults, even if these tests run in the background of a shell, which ignores SIGINT.
    plain, supervised = (int(line.split()[1], 16) for line in (plain, supervised))
    assert supervised & ~plain == 0


# ---- a workdir in use

# Holds the lock as a trainer does, until SIGTERM.
HOLDER = """
import pathlib, signal, sys
from moe_jax.record.lock import lock_workdir
with lock_workdir(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    signal.alarm(60)  # ends the process even if the test fails
    signal.pause()
"""
# A stand-in for the trainer: ends with 1 if the lock is held, else with the given code.
NEXT = """
import fcntl, sys
from pathlib import Path
workdir = Path(sys.argv[2].partition("=")[2])
with open(workdir / "starts", "a") as file:
    file.write("x")
with open(workdir / "lock") as file:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(1)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def holder(tmp_path, cli_env):
    """A frozen trainer whose supervisor no longer exists."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], env=cli_env, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    yield process
    process.kill()
    process.communicate()


def next_trainer(workdir: Path, code: int, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-I", "-S", "-c", NEXT, str(code), f"--workdir={workdir}"]
    return follow(*options, "--", *command)


@pytest.mark.parametrize("code", [0, 3])
def test_it_waits_for_the_frozen_trainer_of_another_supervisor(tmp_path, holder, code):
    process = next_trainer(tmp_path, code)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert f" in use by process {holder.pid} on " in line and "(stopped by a signal" in line
    holder.send_signal(signal.SIGTERM)
    holder.send_signal(signal.SIGCONT)
    process.communicate(timeout=ENDS)
    assert (process.returncode, starts(tmp_path)) == (code, 2)


def test_it_waits_only_so_long_and_hears_a_signal_meanwhile(tmp_path, holder):
    process = next_trainer(tmp_path, 0, "--max_in_use=0.1")
    process.communicate(timeout=ENDS)
    assert (process.returncode, starts(tmp_path)) == (1, 1)
    process = next_trainer(tmp_path, 0)
    assert process.stdout is not None and " in use by " in process.stdout.readline()
    process.terminate()
    process.communicate(timeout=ENDS)
    assert (process.returncode, starts(tmp_path)) == (1, 2)


@pytest.mark.parametrize("make", [lambda path: path.write_text("process 1 on here\n"), os.mkfifo])
def test_a_lock_that_nobody_holds_is_not_waited_for(tmp_path, waits, capfd, make):
    make(tmp_path / "lock")
    assert supervise.main(arguments([{"end": 1}], tmp_path)) == 1
    assert (starts(tmp_path), waits, capfd.readouterr().out) == (1, [], "")


# ---- the files that it reads


def test_the_home_folder(tmp_path, monkeypatch):
    """`~` means the same folder as in the trainer."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert supervise._folder("~/run") == tmp_path / "run"


def test_it_sees_the_checkpoints_that_the_trainer_commits(tmp_path):
    assert supervise.kept_step(tmp_path) == 0
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (9, 10):
        checkpoints.save(step, {"x": np.arange(3)})
    checkpoints.close()
    (tmp_path / "checkpoints" / "99").mkdir()
    (tmp_path / "checkpoints" / "99.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "checkpoints" / "quarantine").mkdir()
    assert supervise.kept_step(tmp_path) == 10
    (tmp_path / "checkpoints" / "10" / "commit_success.txt").unlink()
    assert supervise.kept_step(tmp_path) == 9


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ('{"step": 3}\n{"step": 4}\n', 4),
        ('{"step": 3}\n{"step": 4}', 3),  # without its line break the last line is incomplete
        ('{"step": 3}\nnull\n{"st\n' + "[" * 100_000 + "\n", 3),
        ('{"step": 3, "x": "' + "y" * (1 << 20) + '"}\n{"step": 5}\n', 5),
        ("", 0),
    ],
)
def test_the_last_whole_line_says_the_step(tmp_path, text, step):
    (tmp_path / "metrics.jsonl").write_text(text)
    assert supervise.reached_step(tmp_path) == step


def test_it_needs_no_jax():
    """JAX may be the reason for the restart, and the supervisor must stay small."""
    code = "import sys, launch.supervise; print(sorted({'jax', 'numpy', 'etils'} & {*sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(supervise.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("redirect", ["", "> /dev/full", ">&-"])  # "": into a pipe without a reader
def test_a_supervisor_without_a_screen_goes_on(tmp_path, redirect):
    read, write = os.pipe()
    os.close(read)
    plan = [{"saved": [2], "end": 42}, {"saved": [4], "end": 42}, {"end": 0}]
    command = [sys.executable, "-S", "-m", "launch.supervise", *arguments(plan, tmp_path)]
    done = subprocess.run(
        ["bash", "-c", f'"$@" {redirect}', "bash", *command],
        cwd=Path(supervise.__file__).parents[1],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        stdout=write,
        stderr=subprocess.PIPE,
        timeout=ENDS,
    )
    os.close(write)
    assert (done.returncode, done.stderr, starts(tmp_path)) == (0, b"", 3)
