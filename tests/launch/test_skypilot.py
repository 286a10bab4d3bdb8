"""launch/skypilot.yaml: its exit codes, and its run script under the variables of SkyPilot."""

import json
import os
import subprocess
from pathlib import Path

import yaml

from launch.job import AGAIN

TASK = yaml.safe_load((Path(__file__).resolve().parents[2] / "launch/skypilot.yaml").read_text())


def test_the_exit_codes_are_those_of_the_other_launchers():
    recovery = TASK["resources"]["job_recovery"]
    assert tuple(recovery["recover_on_exit_codes"]) == AGAIN
    assert recovery["max_restarts_on_errors"] == 0


def test_a_node_knows_who_it_is(tmp_path):
    python = tmp_path / "moe_jax" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        "#!/usr/bin/env python3\nimport json, os, sys\n"
        "names = [name for name in os.environ if name.startswith('MOE_JAX_')]\n"
        "print(json.dumps([sys.argv[1:], {name: os.environ[name] for name in names}]))\n"
    )
    python.chmod(0o755)
    env = os.environ | {
        "HOME": str(tmp_path),
        "SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        **TASK["envs"],
        "WORKDIR": "gs://b/two words",
        "FLAGS": "--config.train.steps=3 --devices=2",
    }
    done = subprocess.run(["bash", "-c", TASK["run"]], env=env, capture_output=True, check=True)
    arguments, variables = json.loads(done.stdout)
    assert arguments == [
        *("-m", "moe_jax", "train", "--config=configs/tiny.py", "--workdir=gs://b/two words"),
        *("--config.train.steps=3", "--devices=2"),
    ]
    assert variables == {
        "MOE_JAX_COORDINATOR": "10.0.0.5:8476",
        "MOE_JAX_PROCESS_COUNT": "2",
        "MOE_JAX_PROCESS_ID": "1",
    }
