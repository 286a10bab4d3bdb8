"""launch.slurm: its script run with a stand-in srun, and on a real Slurm (.ci/slurm.sh)."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from launch_runs import ROOT, digest, following, trainer, two_process_flags
from small_run import SMALL, train_rows, write_corpus

from launch import sweep
from launch.job import Job
from launch.shell import LaunchError, Shell
from launch.slurm import SlurmOptions, main, script, submit

SUPERVISED = ["-m", "launch.supervise", "--max_stuck=7", "--", "trainer", "-m", "moe_jax", "train"]
AWKWARD = ("--a=two words", "--b='\"$HOME`id`", "--c=line\nbreak", "--d=")


def run_script(tmp_path, jobs, codes, **environment):
    """Run the batch script with a stand-in for srun that ends its tasks with `codes`."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    tasks = "\n".join(
        f'SLURM_PROCID={index} "$@" {code}; [ $? -gt $worst ] && worst=$?'
        for index, code in enumerate(codes)
    )
    programs = {
        "srun": f"shift 3; worst=0\n{tasks}\nexit {max(codes)}",
        "scontrol": 'echo "scontrol $*"',
        "trainer": 'for last; do :; done; printf "%s\\0" "$@" >"$SEEN"; exit "$last"',
    }
    for name, body in programs.items():
        path = folder / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    options = SlurmOptions(python="trainer", directory=str(tmp_path), logs="my logs", max_stuck=7)
    (tmp_path / "my logs").mkdir(exist_ok=True)
    text = script(jobs, options)
    seen = tmp_path / "seen"
    env = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
        "SEEN": str(seen),
        **environment,
    }
    done = subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True)
    return done, seen.read_text().split("\0")[:-1]


def test_arguments_arrive_as_they_were_given(tmp_path):
    _, seen = run_script(tmp_path, [Job("one", AWKWARD)], [0])
    assert seen == [*SUPERVISED, *AWKWARD, "0"]
    jobs = [Job("one", ("--x=1",)), Job("two", AWKWARD)]
    _, seen = run_script(tmp_path, jobs, [0], SLURM_ARRAY_TASK_ID="1")
    assert seen == [*SUPERVISED, *AWKWARD, "0"]


@pytest.mark.parametrize(
    ("codes", "ends", "again"),
    [
        ([0, 0], 0, False),
        ([42, 42], 0, True),
        ([134, 137], 0, True),
        ([143, 0], 0, True),
        ([1, 134], 1, False),  # the abort of the survivor must not mask the error
        ([3, 3], 3, False),
        ([2, 2], 2, False),
        ([139, 134], 139, False),
    ],
)
def test_what_goes_back_into_the_queue(tmp_path, codes, ends, again):
    done, _ = run_script(tmp_path, [Job("one", ())], codes)
    assert (done.returncode, "scontrol requeue 7" in done.stdout) == (ends, again), done
    assert not list((tmp_path / "my logs").iterdir())


def test_restarts_are_bounded(tmp_path):
    done, _ = run_script(tmp_path, [Job("one", ())], [42], SLURM_RESTART_COUNT="100")
    assert done.returncode == 42 and "requeue" not in done.stdout
    assert "restarted 100 times, giving up" in done.stdout


def test_what_slurm_is_asked_for():
    options = SlurmOptions(
        nodes=2, processes_per_node=8, gpus_per_node=8, time="1:00:00", sbatch=("--qos=low",)
    )
    asked = set(script([Job("one", ())], options).splitlines())
    assert {
        f"#SBATCH --{flag}"
        for flag in (
            "job-name=one",
            "nodes=2",
            "ntasks-per-node=8",
            "gpus-per-node=8",
            "time=1:00:00",
            "signal=TERM@120",
            "requeue",
            "open-mode=append",
            "qos=low",
        )
    } <= asked
    array = script([Job(name, ()) for name in ("one", "two", "three")], SlurmOptions(at_once=2))
    assert "#SBATCH --array=0-2%2\n" in array


def test_dry_run_prints_all_and_runs_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    arguments = ["--name=one", "--dry_run", f"--directory={tmp_path}", "--", "--workdir=a b"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "arguments=('--workdir=a b')" in printed
    assert f"+ sbatch --parsable {tmp_path}/runs/slurm/one.sh" in printed
    assert not list(tmp_path.iterdir())


def test_mistakes_are_one_sentence(tmp_path, monkeypatch):
    options = SlurmOptions(directory=str(tmp_path))
    with pytest.raises(LaunchError, match="no job"):
        submit([], options, Shell())
    with pytest.raises(LaunchError, match="lower-case"):
        Job("One run", ())
    for arguments, sentence in (
        (["--nodes=-3"], "--nodes=-3 is too small: give 1 or more"),
        (["--nodes=two"], "Argument --nodes: invalid int value: 'two': see .* --help"),
        (["--nodse=2"], "Unrecognized arguments: --nodse=2: see .* --help"),
    ):
        with pytest.raises(LaunchError, match=sentence):
            main(["--name=one", *arguments, "--", "--workdir=x"])
    with pytest.raises(LaunchError, match="nothing to run"):
        main(["--name=one", "--dry_run"])
    with pytest.raises(LaunchError, match="cannot be written"):
        main(["--name=one", "--logs=/dev/null/x", "--", "--workdir=x"])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="no program 'sbatch' on PATH"):
        submit([Job("one", ())], options, Shell())


@pytest.fixture
def launch(tmp_path, cli_env, monkeypatch):
    """`launch(jobs, ...)` submits to the Slurm of this machine; returns (job id, log folder)."""
    for name, value in cli_env.items():
        monkeypatch.setenv(name, value)
    logs, started = tmp_path / "the logs", []

    def start(jobs, **options):
        chosen = SlurmOptions(python=sys.executable, directory=str(ROOT), logs=str(logs), **options)
        started.append(submit(jobs, chosen, Shell()))
        return started[-1], logs

    yield start
    subprocess.run(["scancel", *started], check=True)


@pytest.mark.slurm
def test_two_processes_are_stopped_twice_and_end_bit_equal(tmp_path, launch):
    files = write_corpus(tmp_path / "text")
    first = Job("undisturbed", two_process_flags(tmp_path / "one", files))
    job, logs = launch([first], processes_per_node=2)
    with following(logs / f"undisturbed-{job}.out") as output:
        assert output.until("exit code").endswith("exit code 0\n"), "".join(output.lines)

    second = Job("disturbed", two_process_flags(tmp_path / "two", files))
    job, logs = launch([second], processes_per_node=2)
    with following(logs / f"disturbed-{job}.out") as output:
        output.until("step 10/200")
        # The same as --signal=TERM before the time limit: signals the processes, not the script.
        subprocess.run(["scancel", "--signal=TERM", job], check=True)
        output.until("preempted: step")
        output.until("exit code 42")
        output.until("restart 1")
        output.until(r"step \d+/200  loss")
        subprocess.run(["scontrol", "requeue", job], check=True)  # as an operator would
        output.until("restart 2")
        output.until("exit code 0")
    assert digest(tmp_path / "two") == digest(tmp_path / "one")


@pytest.mark.full
@pytest.mark.slurm
def test_a_trainer_that_is_killed_is_started_again_in_place(tmp_path, launch):
    files = write_corpus(tmp_path / "text")
    ends = {}
    for name in ("undisturbed", "killed"):
        job = Job(name, two_process_flags(tmp_path / name, files))
        number, logs = launch([job], processes_per_node=2)
        with following(logs / f"{name}-{number}.out") as output:
            if name == "killed":
                output.until("step 70/200")
                os.kill(trainer(tmp_path / name, "SLURM_PROCID=1"), signal.SIGKILL)
            output.until("exit code 0$", unless=r"exit code \d+$")
        ends[name] = digest(tmp_path / name)
    assert ends["killed"] == ends["undisturbed"]
    text = "".join(output.lines)
    lost = r"reached step \d+, resumes from \d+, \d+ steps lost, waiting"
    for task, why in (
        ("1", "killed by SIGKILL"),
        ("0", "(asked to be run again|killed by SIGABRT)"),
    ):
        assert re.search(rf"^{task}: \S+ restart 1: {why}.*; {lost}", text, re.MULTILINE), text
    assert "resuming from step 50" in text
    assert len(re.findall(r"killed: job \d+ on .*, restart", text)) == 1  # not through the queue


SWEEP = """
SHARED = {shared!r}

def get_hyper(hyper):
    fixed = [hyper.fixed(key, value) for key, value in SHARED.items()]
    return hyper.product([*fixed, hyper.sweep("config.seed", range(3))])
"""


@pytest.mark.slurm
def test_a_sweep_runs_as_an_array(tmp_path, cli_env, monkeypatch, capsys):
    for name, value in cli_env.items():
        monkeypatch.setenv(name, value)
    small = SMALL | {"data.files": write_corpus(tmp_path / "text"), "train.steps": 3}
    shared = {f"config.{key}": value for key, value in small.items()}
    shared["config"] = str(ROOT / "configs" / "tiny.py")
    (tmp_path / "sweep.py").write_text(SWEEP.format(shared=shared))
    command = [
        f"--sweep={tmp_path / 'sweep.py'}",
        f"--workdir={tmp_path / 'runs'}",
        "--backend=slurm",
        "--devices=1",
        "--cpus_per_process=1",
        f"--python={sys.executable}",
        f"--directory={ROOT}",
        f"--logs={tmp_path / 'logs'}",
    ]
    assert sweep.main(command) == 0
    printed = capsys.readouterr().out
    [job] = re.findall(r"^job (\d+): squeue", printed, re.M)
    try:
        names = sorted(json.loads((tmp_path / "runs" / "sweep.json").read_text()))
        for index in range(3):
            log = next((tmp_path / "logs").glob("*.sh")).stem
            with following(tmp_path / "logs" / f"{log}-{job}_{index}.out") as output:
                output.until("exit code 0")
    finally:
        subprocess.run(["scancel", job], check=True)
    assert len({train_rows(tmp_path / "runs" / name)[-1]["loss"] for name in names}) == 3
    assert sweep.main(command) == 0  # all runs have finished
    again = capsys.readouterr().out
    assert again.count("has finished: skipped") == 3 and "sbatch" not in again
