"""launch.sweep: the check before the first run, failed and finished runs, clusters."""

import dataclasses
import json
import re
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from small_run import ONE_LAYER, SMALL, write_corpus

import launch
from launch import local, sweep
from launch.job import Job
from launch.runs import expand, job
from launch.shell import LaunchError, option
from moe_jax.cli.check import check
from moe_jax.record.lock import lock_workdir

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs/sweeps").glob("*.py"))

# A stand-in for the trainer.  By seed: 0 and 3 finish, 1 fails, 2 asks once to be run again.  It
# records its starts in calls.txt.
TRAINER = """
import json, os, sys
flags = dict(argument[2:].split("=", 1) for argument in sys.argv[1:])
workdir, seed = flags["workdir"], int(flags["config.seed"])
with open("calls.txt", "a") as file:
    file.write(f"{seed}\\n")
print("step 1/8  loss 5.0")
if seed == 1:
    sys.exit("Error: the disk is full.")
if seed == 2 and not os.path.exists("again"):
    open("again", "w").close()
    sys.exit(42)
with open(os.path.join(workdir, "metrics.jsonl"), "w") as file:
    file.write(json.dumps({"step": 8, "eval_loss": 1.5}) + "\\n")
"""


def sweep_file(folder: Path, body: str) -> str:
    path = folder / "sweep_of_test.py"
    path.write_text(f"def get_hyper(hyper):\n    return {body}\n")
    return str(path)


def seeds(folder: Path, *values: int, last: str = "") -> str:
    """Write a sweep over seeds of tiny, 8 steps each; `last` is one more run, as Python code."""
    each = f"hyper.sweep('config.seed', {list(values)})"
    every = "hyper.fixed('config', 'configs/tiny.py'), hyper.fixed('config.train.steps', 8)"
    every += ", hyper.fixed('config.optimizer.warmup_steps', 2)"
    return sweep_file(folder, f"hyper.product([{every}, {each}]) + [{last}]")


def check_here(command: list[str], *, input: str, **how) -> subprocess.CompletedProcess:
    """The answers of `python -m moe_jax check`, without starting that process."""
    devices = int(command[-1].removeprefix("--devices=")) or 1
    answers = [check(json.loads(line), devices) for line in input.splitlines()]
    out = "".join(f"{json.dumps(answer)}\n" for answer in answers)
    return subprocess.CompletedProcess(command, 0, out)


@pytest.fixture
def place(tmp_path, monkeypatch, cli_env):
    """The working directory: an empty folder with a link to configs, as in a checkout.

    A sweep that a test starts in its own process also checks the runs in that process: a new one
    per check would spend most of its time importing JAX.
    """
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    here = types.SimpleNamespace(run=check_here, PIPE=subprocess.PIPE)
    monkeypatch.setattr(sweep, "subprocess", here)
    for name, value in cli_env.items():
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.fixture
def trainer(place, monkeypatch):
    """Replace the trainer by the stand-in above; returns the seeds that it was started with."""
    (place / "trainer.py").write_text(TRAINER)

    def command(job: Job) -> list[str]:
        return [sys.executable, str(place / "trainer.py"), *job.arguments]

    monkeypatch.setattr(local, "command", command)
    calls = place / "calls.txt"
    return lambda: [int(line) for line in calls.read_text().split()] if calls.exists() else []


# ---- before the first run


BAD = "{'config': 'configs/tiny.py', 'config.model.moe.top_k': 9}"


def test_a_bad_run_is_refused_by_name_and_the_others_run(place, trainer, capsys):
    path = seeds(place, 0, 3, last=BAD)
    bad = list(expand(path))[-1]
    assert sweep.main([f"--sweep={path}", "--workdir=runs"]) == 1
    printed = capsys.readouterr().out
    assert "2 of 2 runs finished" in printed
    assert_names_the_refused(printed, bad, 3)
    assert trainer() == [0, 3] and not (place / "runs" / bad).exists()


def assert_names_the_refused(printed: str, name: str, runs: int) -> None:
    """The refused run is named before the first run starts and in the last lines."""
    before, *_ = re.split(r"^(?:\[1/\d\] )?\+ ", printed, maxsplit=1, flags=re.MULTILINE)
    assert re.search(rf"^{name} is refused: .*top_k is 9 with 8 experts", before, re.MULTILINE)
    *_, last, reason = printed.splitlines()
    assert last == f"1 of {runs} runs refused: fix the sweep file"
    assert reason.startswith(f"  {name}: ") and "top_k is 9 with 8 experts" in reason


def test_where_all_are_refused_nothing_is_written(place, trainer, capsys):
    assert sweep.main([f"--sweep={sweep_file(place, f'[{BAD}]')}", "--workdir=runs"]) == 1
    assert not (place / "runs").exists() and trainer() == []


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--workdir="], "--workdir is empty"),  # the runs' folders would be created in /
        (["--workdir=runs", "--jobs=0"], "--jobs must be at least 1"),
        (["--workdir=runs", "--devices=-1"], "--devices at least 0"),
        (["--workdir=runs", "--devices=x"], "invalid int value: 'x'"),
        (["--workdir=runs", "--backend=cloud"], "invalid choice: 'cloud'"),
        (["--workdir=runs", "--job=2"], "[Uu]nrecognized arguments: --job=2"),
        ([], "required: --workdir"),
    ],
)
def test_mistakes_on_the_command_line(place, trainer, flags, sentence):
    with pytest.raises(LaunchError, match=sentence):
        sweep.main([f"--sweep={seeds(place, 0)}", *flags])
    assert not trainer()


def test_the_home_folder(place, trainer, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    seeds(place, 0)
    assert sweep.main(["--sweep=~/sweep_of_test.py", "--workdir=~/runs"]) == 0
    assert (place / "runs" / "sweep.json").exists() and not (place / "~").exists()
    assert len(list((place / "runs").glob("*/metrics.jsonl"))) == 1


def test_devices_are_those_of_the_run(place, trainer, capsys):
    """The config is checked for 4 devices, and the trainer gets --devices=4."""
    path = seeds(place, 0, last="{'config': 'configs/tiny.py', 'config.mesh.expert': 4}")
    assert sweep.main([f"--sweep={path}", "--workdir=runs", "--devices=4", "--dry_run"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("+ ")]
    assert len(lines) == 2 and all(line.endswith(" --devices=4") for line in lines)


def test_dry_run_starts_and_writes_nothing(place, trainer, capsys):
    path = seeds(place, 0, 3, last=BAD)
    assert sweep.main([f"--sweep={path}", "--workdir=runs", "--dry_run"]) == 1
    out = capsys.readouterr().out
    printed = [line[2:] for line in out.splitlines() if line.startswith("+ ")]
    *names, bad = expand(path)
    assert_names_the_refused(out, bad, 3)
    assert [shlex.split(line)[3:] for line in printed] == [
        ["train", *job(name, expand(path)[name], "runs").arguments] for name in names
    ]
    assert not (place / "runs").exists() and trainer() == []


# ---- runs


def test_failures_are_isolated_and_finished_runs_skipped(place, trainer, capsys):
    path = seeds(place, 0, 1, 2, 3)
    arguments = [f"--sweep={path}", "--workdir=runs"]
    assert sweep.main(arguments) == 1
    assert trainer() == [0, 1, 2, 2, 3]  # 42 was run again, the failure was not
    out = capsys.readouterr().out
    failed = list(expand(path))[1]
    assert "3 of 4 runs finished" in out
    assert f"{failed}: exit code 1 (runs/{failed}/train.log)" in out
    assert "Error: the disk is full." in out
    assert "Error: the disk is full." in (place / "runs" / failed / "train.log").read_text()
    assert json.loads((place / "runs" / "sweep.json").read_text()) == expand(path)

    assert sweep.main(arguments) == 1
    assert trainer() == [0, 1, 2, 2, 3, 1]
    (place / "trainer.py").write_text(TRAINER.replace("seed == 1", "False"))
    assert sweep.main(arguments) == 0
    assert sweep.main(arguments) == 0
    assert trainer() == [0, 1, 2, 2, 3, 1, 1]


def test_a_run_stopped_by_its_stop_file_is_not_called_finished(place, trainer, capsys):
    (place / "trainer.py").write_text("")  # exit code 0, no last evaluation
    assert sweep.main([f"--sweep={seeds(place, 0)}", "--workdir=runs"]) == 1
    assert "exit code 0, not finished" in capsys.readouterr().out


def test_runs_in_parallel_all_end(place, trainer):
    assert sweep.main([f"--sweep={seeds(place, 0, 2, 3)}", "--workdir=runs", "--jobs=3"]) == 0
    assert sorted(trainer()) == [0, 2, 2, 3]


def test_asking_for_ever_to_be_run_again_ends(place, trainer, monkeypatch):
    (place / "trainer.py").write_text(TRAINER.replace('os.path.exists("again")', "False"))
    runner = local.Local(place, 1, lambda line: None)
    arguments = (f"--workdir={place}", "--config.seed=2")
    assert runner.run([Job("n", arguments)]) == {"n": local.STOPPED}
    assert trainer() == local.ATTEMPTS * [2]


def test_a_signal_stops_the_live_run_and_starts_no_more(place, trainer, capsys):
    (place / "trainer.py").write_text(
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))\n"
        "print('step 1/8', flush=True)\n"
        "signal.pause()\n"
    )
    before = signal.getsignal(signal.SIGTERM)
    said = []

    def say(line: str) -> None:
        said.append(line)
        if "step 1/8" in line:
            signal.raise_signal(signal.SIGTERM)  # in this thread, which is not the main one

    runner = local.Local(place, 1, say)
    assert runner.run([Job("a", ()), Job("b", ())]) == {"a": local.STOPPED, "b": None}
    assert runner.stopping and len([line for line in said if " + " in line]) == 1
    assert signal.getsignal(signal.SIGTERM) is before


# ---- with the trainer itself


@pytest.mark.lifecycle
def test_trainer_and_live_workdir(place, run_cli):
    """Two runs; a live process holds the workdir of one of them at first."""
    small = SMALL | {"data.files": write_corpus(place / "text"), "train.steps": 2}
    small |= ONE_LAYER | {"eval.samples": 0}
    every = "".join(f"hyper.fixed('config.{key}', {value!r})," for key, value in small.items())
    path = sweep_file(
        place,
        f"hyper.product([hyper.fixed('config', 'configs/tiny.py'), {every} "
        "hyper.sweep('config.seed', [0, 1])])",
    )
    names = list(expand(path))
    arguments = ["launch.sweep", f"--sweep={path}", "--workdir=runs"]
    with lock_workdir(place / "runs" / names[0]):
        done = run_cli(arguments, cwd=place)
    assert done.code == 1, done.err
    assert "1 of 2 runs finished" in done.out
    assert re.search(r"exit code 1: Error: --workdir=.* is in use by process \d+ on ", done.out)
    assert not (place / "runs" / names[0] / "metrics.jsonl").exists()

    done = run_cli(arguments, cwd=place)
    assert done.code == 0, done.out
    assert f"{names[1]} has finished: skipped" in done.out
    assert (place / "runs" / names[0] / "metrics.jsonl").exists()


# ---- clusters


@pytest.fixture
def cluster(monkeypatch):
    """Replace the two launchers by stand-ins; returns the jobs that they were handed."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        nodes: int = option(1, "Nodes.")

    handed = []

    def submit(jobs, options, shell):
        handed.append((list(jobs), options.nodes, shell.dry_run))
        return "77"

    slurm = types.SimpleNamespace(SlurmOptions=Options, submit=submit)
    tpu_vm = types.SimpleNamespace(
        TpuOptions=Options, launch=lambda job, options, shell: submit([job], options, shell)
    )
    for name, module in (("slurm", slurm), ("tpu_vm", tpu_vm)):
        monkeypatch.setitem(sys.modules, f"launch.{name}", module)
        monkeypatch.setattr(launch, name, module, raising=False)
    return handed


def test_slurm_gets_one_array_of_what_is_left(place, trainer, cluster, capsys):
    arguments = [f"--sweep={seeds(place, 0, 2, 3)}", "--workdir=runs"]
    sweep.main([f"--sweep={seeds(place, 0)}", "--workdir=runs"])
    named = expand(seeds(place, 0, 2, 3))
    assert sweep.main([*arguments, "--backend=slurm", "--devices=4", "--nodes=2"]) == 0
    left = [job(name, named[name], "runs") for name in list(named)[1:]]
    assert cluster == [(left, 2, False)]
    assert "squeue -j 77" in capsys.readouterr().out


def test_tpu_vms_get_one_job_each(place, cluster, capsys):
    path = seeds(place, 0, 3, last=BAD)
    arguments = [f"--sweep={path}", "--workdir=runs", "--devices=4", "--dry_run"]
    assert sweep.main([*arguments, "--backend=tpu_vm"]) == 1
    *expected, bad = [job(name, run, "runs") for name, run in expand(path).items()]
    assert cluster == [([each], 1, True) for each in expected]
    assert_names_the_refused(capsys.readouterr().out, bad.name, 3)


def test_a_refused_vm_stops_no_other(place, cluster, monkeypatch, capsys):
    path = seeds(place, 0, 2, 3)
    names = list(expand(path))
    launch_one = launch.tpu_vm.launch

    def refuse_the_first(job, options, shell):
        if job.name == names[0]:
            raise LaunchError("It is there already.")
        launch_one(job, options, shell)

    monkeypatch.setattr(launch.tpu_vm, "launch", refuse_the_first)
    arguments = [f"--sweep={path}", "--workdir=runs", "--devices=1", "--backend=tpu_vm"]
    with pytest.raises(LaunchError, match="1 of 3 runs got no VM"):
        sweep.main(arguments)
    assert [jobs[0].name for jobs, _, _ in cluster] == names[1:]
    assert f"{names[0]}: It is there already." in capsys.readouterr().out


def test_a_cluster_needs_to_know_the_devices(place, cluster):
    with pytest.raises(LaunchError, match="--devices is missing"):
        sweep.main([f"--sweep={seeds(place, 0)}", "--workdir=runs", "--backend=slurm"])
    assert cluster == []
