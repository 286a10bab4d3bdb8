"""A platform that is not available gives one sentence in every command."""

import json
import subprocess
import sys

import pytest
from small_run import flags

COMMANDS = {
    "train": lambda run: ["train", *run],
    "bench": lambda run: ["bench", *run],
    "doctor": lambda run: ["doctor", *run],
    "conformance": lambda run: ["doctor", "--conformance"],
    "check": lambda run: ["check"],
}


@pytest.mark.parametrize(
    ("command", "platforms"),
    [
        ("train", "nonsense"),
        ("bench", "cuda"),
        *(
            pytest.param(*case, marks=pytest.mark.lifecycle)
            for case in (
                ("train", "cpu,nonsense"),
                ("doctor", "nonsense"),
                ("conformance", "cuda"),
                ("check", "nonsense"),
            )
        ),
    ],
)
def test_a_platform_that_is_not_there(tmp_path, cli_env, command, platforms):
    run = flags(tmp_path / "run", f"{tmp_path}/*.txt")
    done = subprocess.run(
        [sys.executable, "-m", "moe_jax", *COMMANDS[command](run)],
        env=cli_env | {"JAX_PLATFORMS": platforms},
        input=json.dumps(run) + "\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"Error: JAX_PLATFORMS={platforms} cannot be started (")
    assert "platforms of this machine: cpu: set" in line
