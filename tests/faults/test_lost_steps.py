"""The goodput report of a real run that was killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from small_run import flags, write_corpus

from moe_jax.checkpoint import Checkpoints

STEPS, EVERY = 400, 40
OVERRIDES = {
    "model.num_layers": 1,
    "model.moe.every": 1,
    "train.steps": STEPS,
    "checkpoint.every_steps": EVERY,
    "eval.samples": 0,
}


def run_until(command: list[str], env: dict[str, str], text: str) -> None:
    """Start the trainer and kill it once it prints a line that begins with `text`."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        assert any(line.startswith(text) for line in process.stdout)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.full
def test_killed_twice_and_finished(tmp_path, cli_env, run_cli):
    workdir = tmp_path / "run"
    command = ["moe_jax", "train", *flags(workdir, write_corpus(tmp_path / "text"), **OVERRIDES)]
    began = time.time()
    run_until(command, cli_env, f"step {2 * EVERY + 30}/")  # at least one save is complete by then
    first = Checkpoints(workdir / "checkpoints").steps()[-1]
    run_until(command, cli_env, "state ready")  # before its first step
    done = run_cli(command)
    assert done.code == 0, done.err
    wall = time.time() - began

    shown = run_cli(["moe_jax", "goodput", f"--workdir={workdir}"])
    assert shown.code == 0, shown.err
    assert "| 100.0 |" in shown.out and shown.out.count("| killed ") == 2

    told = json.loads(run_cli(["moe_jax", "goodput", f"--workdir={workdir}", "--json"]).out)
    killed, early, last = told["attempts"]
    assert [each["exit_code"] for each in told["attempts"]] == [None, None, 0]
    assert (killed["resumed_from"], last["resumed_from"], last["reached"]) == (0, first, STEPS)
    assert killed["reached"] >= first and killed["lost_steps"] == killed["reached"] - first
    assert early["lost_steps"] == last["lost_steps"] == 0
    # The parts add up to the time from the first process's start to the last one's end, except for
    # the imports before a process reads the clock.
    seconds = told["seconds"]
    assert sum(seconds.values()) == pytest.approx(told["whole_seconds"], rel=1e-12)
    assert told["whole_seconds"] < wall
    assert min(seconds.values()) >= 0
    assert all(seconds[name] > 0 for name in ("step", "compile", "checkpoint", "init", "restart"))
    assert told["goodput"] == pytest.approx(seconds["step"] / told["whole_seconds"])
