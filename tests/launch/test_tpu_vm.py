"""launch.tpu_vm against a stand-in for gcloud whose hosts are processes of this machine."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launch_runs import ROOT, digest, following, trainer, two_process_flags
from small_run import write_corpus

from launch import host, tpu_vm
from launch.job import Job
from launch.shell import LaunchError, Shell
from launch.tpu_vm import TpuOptions, main

STAND_IN = Path(__file__).parent / "stand_in"
AWKWARD = ("--workdir=gs://b/two words", "--b='\"$HOME`id`", "--c=line\nbreak", "--d=")


@pytest.fixture
def cloud(tmp_path, cli_env, monkeypatch):
    """The folder of the stand-in's state; its VMs are deleted when the test ends."""
    folder = tmp_path / "cloud"
    folder.mkdir()
    for name, value in cli_env.items():
        monkeypatch.setenv(name, value)
    python = Path(sys.executable).parent  # the stand-ins are Python too
    monkeypatch.setenv("PATH", f"{STAND_IN}:{python}:{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN", str(folder))
    monkeypatch.delenv("STAND_IN_PREEMPT", raising=False)
    yield folder
    for vm in folder.glob("*/startup-script"):
        tpu_vm.delete(vm.parent.name, options(tmp_path), Shell())


def options(tmp_path, **changed):
    prepare = tmp_path / "prepare.sh"
    prepare.write_text('echo "prepared it\'s host $MOE_JAX_PROCESS_ID"\n')
    usual = {
        "zone": "us-east5-a",
        "accelerator_type": "v5p-16",
        "runtime_version": "v2-alpha-tpuv5",
        "prepare": str(prepare),
        "python": sys.executable,
        "directory": str(ROOT),
        "poll_seconds": 0.1,
        "scripts": str(tmp_path / "scripts"),
    }
    return TpuOptions(**usual | changed)


def calls(cloud, verb=""):
    """Arguments of all calls of gcloud, from after the verb on."""
    every = [json.loads(line) for line in (cloud / "calls.jsonl").read_text().splitlines()]
    return [call[4:] for call in every if not verb or call[3] == verb]


@pytest.mark.lifecycle
def test_a_preempted_vm_comes_back_and_ends_bit_equal(tmp_path, cloud, monkeypatch):
    files = write_corpus(tmp_path / "text")
    ends = {}
    for name in ("undisturbed", "disturbed"):
        if name == "disturbed":
            saved = tmp_path / name / "checkpoints" / "50" / "manifest.json"
            monkeypatch.setenv("STAND_IN_PREEMPT", str(saved))
        job = Job(name, two_process_flags(tmp_path / name, files))
        assert tpu_vm.run(job, options(tmp_path, spot=True), Shell()) == 0
        ends[name] = digest(tmp_path / name)
    assert ends["disturbed"] == ends["undisturbed"]
    created = [call[0] for call in calls(cloud, "create")]
    assert created == ["undisturbed", "disturbed", "disturbed"]
    for number in range(2):
        log = (cloud / "disturbed" / "hosts" / str(number) / "run.log").read_text()
        assert f"prepared it's host {number}" in log
        assert ("resuming from step" in log) == (number == 0), (
            log
        )  # only the lead process prints it


@pytest.mark.full
def test_a_trainer_that_is_killed_is_started_again_on_its_host(tmp_path, cloud):
    files = write_corpus(tmp_path / "text")
    ends, chosen = {}, options(tmp_path)
    for name in ("undisturbed", "killed"):
        tpu_vm.launch(Job(name, two_process_flags(tmp_path / name, files)), chosen, Shell())
        assert tpu_vm.wait(name, chosen, Shell())
        hosts = [cloud / name / "hosts" / str(number) for number in range(2)]
        with following(hosts[0] / "run.log") as output:
            if name == "killed":
                output.until("step 70/200")
                os.kill(trainer(tmp_path / name, "MOE_JAX_PROCESS_ID=1"), signal.SIGKILL)
            output.until("exit code 0$", unless=r"exit code \d+$")
        ends[name] = digest(tmp_path / name)
    assert ends["killed"] == ends["undisturbed"]
    subprocess.run(["flock", str(hosts[1] / "lock"), "true"], check=True)  # until it has ended
    survivor, victim = ((folder / "run.log").read_text() for folder in hosts)
    lost = r"reached step \d+, resumes from \d+, \d+ steps lost, waiting"
    assert re.search(rf" restart 1: killed by SIGKILL; {lost} 5 s$", victim, re.MULTILINE), victim
    assert re.search(rf" restart 1: (asked to be|killed by SIGABRT).*; {lost}", survivor), survivor
    assert "resuming from step 50" in survivor
    assert len(calls(cloud, "create")) == 2  # the VM was not requested again


def test_arguments_arrive_as_they_were_given(tmp_path):
    seen = tmp_path / "seen"
    program = tmp_path / "a trainer"
    program.write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" >{shlex.quote(str(seen))}\nexit 3\n')
    program.chmod(0o755)
    text = host.script(host.train(str(program), str(tmp_path), AWKWARD, 5))
    for command in (["bash", "-c", text], ["bash", "-c", host.as_root(text)]):
        env = os.environ | {
            "PATH": f"{STAND_IN}:{os.environ['PATH']}",
            "MOE_JAX_HOME": str(tmp_path / "home of host"),
        }
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        assert "training; output" in done.stdout
        # The next script does not wait for the lock, so wait here until the run has ended.
        lock = str(tmp_path / "home of host" / "lock")
        subprocess.run(["flock", lock, "true"], check=True)
        supervised = ["-m", "launch.supervise", "--max_stuck=5", "--", str(program)]
        given = seen.read_text().split("\0")[:-1]
        assert given == [*supervised, "-m", "moe_jax", "train", *AWKWARD]
        assert (tmp_path / "home of host" / "exit_code").read_text() == "3\n"
        seen.unlink()


def test_a_host_that_cannot_be_prepared_says_so(tmp_path, cloud):
    chosen = options(tmp_path)
    Path(chosen.prepare).write_text("false")
    assert tpu_vm.run(Job("one", ("--workdir=gs://b/c",)), chosen, Shell()) == 1
    assert "not ready to train" in (cloud / "one" / "hosts" / "1" / "run.log").read_text()


def test_what_is_asked_of_cloud_tpu(tmp_path, cloud, capsys):
    chosen = options(
        tmp_path, node_count=3, reserved=True, project="mine", gcloud=("--network=a net",)
    )
    tpu_vm.launch(Job("one", ("--workdir=runs/x",)), chosen, Shell())
    [given] = calls(cloud, "create")
    assert given[0] == "one"
    assert set(given[1:]) == {
        "--node-count=3",
        "--node-prefix=one",
        "--accelerator-type=v5p-16",
        "--runtime-version=v2-alpha-tpuv5",
        f"--metadata-from-file=startup-script={tmp_path}/scripts/one.sh",
        "--reserved",
        "--network=a net",
        "--async",
        "--zone=us-east5-a",
        "--project=mine",
        "--quiet",
    }
    printed = capsys.readouterr().out
    assert "'--network=a net'" in printed
    assert "warning: --workdir=runs/x must outlive the VM" in printed


def test_create_install_status_logs_stop_delete(tmp_path, cloud, capfd):
    (tmp_path / "trainer").write_text("#!/bin/bash\necho up\nexec tail -f /dev/null\n")
    (tmp_path / "trainer").chmod(0o755)
    given = options(tmp_path)
    own = ["--name=one"] + [
        f"--{name}={getattr(given, name)}"
        for name in ("zone", "accelerator_type", "runtime_version", "prepare", "scripts")
    ]
    own += [f"--python={tmp_path}/trainer", f"--directory={tmp_path}", "--poll_seconds=0.1"]
    assert main(["status", *own]) == 0
    assert "one: no such VM" in capfd.readouterr().out
    assert main(["create", *own]) == 0
    printed = capfd.readouterr().out
    assert "one: WAITING_FOR_RESOURCES" in printed and printed.endswith("one: ACTIVE\n")
    homes = [cloud / "one" / "hosts" / str(number) for number in range(2)]
    for home in homes:  # wait for the start-up script to end
        with following(home / "boot.log") as log:
            log.until("prepared")
        subprocess.run(["flock", str(home / "lock"), "true"], check=True)
    assert main(["install", *own]) == 0
    printed = capfd.readouterr().out
    assert "prepared it's host 0" in printed and "prepared it's host 1" in printed
    assert main(["status", *own]) == 0
    assert "run: idle\n" in capfd.readouterr().out

    # On an existing VM, the run is started on every host through ssh.
    command = host.as_root(host.script(host.train(f"{tmp_path}/trainer", str(tmp_path), (), 9)))
    tpu_vm._everywhere(Shell(), given, "one", command)
    tpu_vm._everywhere(Shell(), given, "one", command)
    printed = capfd.readouterr().out
    assert printed.count("\ntraining; output") == 2 and printed.count("\nbusy already") == 2
    assert main(["status", *own]) == 0
    assert "run: running\n" in capfd.readouterr().out
    for home in homes:
        with following(home / "run.log") as log:
            log.until("up")
    assert main(["stop", *own]) == 0
    for home in homes:
        subprocess.run(["flock", "--wait=8", str(home / "lock"), "true"], check=True)
        assert (home / "exit_code").read_text() == "143\n"
        assert (home / "run.log").read_text().count("exit code") == 1
    assert main(["logs", *own]) == 0
    assert "exit code 143" in capfd.readouterr().out
    assert main(["delete", *own]) == 0
    assert not (cloud / "one").exists()


def test_a_run_on_a_vm_that_is_there(tmp_path, cloud):
    program = tmp_path / "trainer"
    program.write_text(f'#!/bin/bash\necho "$@" >>{tmp_path}/seen\nexit 3\n')
    program.chmod(0o755)
    chosen = options(tmp_path, python=str(program))
    tpu_vm.launch(Job("one", ()), chosen, Shell())  # its start-up script runs nothing
    job = Job("one", ("--workdir=gs://b/c",))
    assert tpu_vm.run(job, chosen, Shell()) == 3
    for home in (cloud / "one" / "hosts").iterdir():
        subprocess.run(["flock", str(home / "lock"), "true"], check=True)
    seen = (tmp_path / "seen").read_text().splitlines()
    command = f"-m launch.supervise --max_stuck=3 -- {program} -m moe_jax train --workdir=gs://b/c"
    assert seen == [command, command]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("run: running\nstep 1/2", ("running", "step 1/2")),
        ("SSH: connecting\nrun: 42\nrun: stopped", ("42", "run: stopped")),
        ("run: idle", ("idle", "")),
        ("", ("running", "no answer yet")),
    ],
)
def test_what_a_host_answers(answer, expected):
    assert host.read_progress(answer) == expected


def test_waiting_has_an_end(tmp_path, cloud):
    job = Job("one", ("--workdir=gs://b/c",))
    with pytest.raises(LaunchError, match="WAITING_FOR_RESOURCES after 0 minutes and stays queued"):
        tpu_vm.run(job, options(tmp_path, wait_minutes=0), Shell())


def test_a_vm_that_is_taken_away_each_time_is_given_up(tmp_path, cloud, capsys):
    def take(*command, show=False):
        return "SUSPENDED" if "describe" in command else ""

    shell = Shell()
    object.__setattr__(shell, "run", take)
    job = Job("one", ("--workdir=gs://b/c",))
    with pytest.raises(LaunchError, match="taken away 3 times"):
        tpu_vm.run(job, options(tmp_path, recreate=2), shell)
    assert "requested again (2 of 2)" in capsys.readouterr().out


def test_dry_run_prints_all_and_runs_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    own = ["--name=one", "--zone=z", "--accelerator_type=v5p-8", "--runtime_version=v"]
    own += ["--repository=https://x/y z", f"--scripts={tmp_path}/s", "--dry_run"]
    for command in ("create", "install", "run", "status", "logs", "stop", "delete"):
        assert main([command, *own, "--", *AWKWARD]) == 0
        assert "+ gcloud compute tpus queued-resources" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "changed", "sentence"),
    [
        ("1one", {}, "begin with a letter"),
        ("one", {"accelerator_type": ""}, "--accelerator_type is missing"),
        ("one", {"spot": True, "reserved": True}, "exclude each other"),
        ("one", {"prepare": "/nowhere"}, "--prepare=/nowhere cannot be read"),
        ("one", {"prepare": ""}, "give --repository"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, cloud, name, changed, sentence):
    with pytest.raises(LaunchError, match=sentence):
        tpu_vm.launch(Job(name, ("--workdir=gs://b/c",)), options(tmp_path, **changed), Shell())
    assert not (cloud / "calls.jsonl").exists()


def test_a_command_that_fails_ends_in_one_sentence(tmp_path, cloud):
    chosen = options(tmp_path)
    job = Job("one", ("--workdir=gs://b/c",))
    tpu_vm.launch(job, chosen, Shell())
    with pytest.raises(LaunchError, match=r"gcloud ended with exit code 1 \(.*ALREADY_EXISTS: one"):
        tpu_vm.launch(job, chosen, Shell())
