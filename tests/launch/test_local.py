"""launch/local.sh: the commands that it prints after a run, here with a stand-in trainer."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from launch_runs import ROOT

# Replaces launch/env.sh and the environment that it would create.
ENV = """\
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV_PYTHON="$ROOT/python"
ensure_env() { :; }
say() { echo "$*"; }
"""
PYTHON = f"""\
#!/bin/bash
[ "$1" = -m ] || exec {sys.executable} "$@"
mkdir -p "$WORKDIR" && echo '{{"train": {{"steps": 8}}}}' >"$WORKDIR/config.json"
"""


@pytest.mark.parametrize(
    ("given", "workdir"),
    [
        ([], "runs/tiny"),
        (["--workdir=my runs/a", "--devices=2", "--config.train.steps=8"], "my runs/a"),
        (["--workdir", "b", "-config.data.files", "x y", "--config.seed", "workdir"], "b"),
    ],
)
def test_next_commands_name_each_flag_once(tmp_path, given, workdir):
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "local.sh", tmp_path / "launch")
    (tmp_path / "launch" / "env.sh").write_text(ENV)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(
        ["bash", "launch/local.sh", *given],
        cwd=tmp_path,
        env=os.environ | {"WORKDIR": workdir},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = re.findall(r"^(?:Train longer|Other mesh|Own text): +(.*)$", done.stdout, re.MULTILINE)
    for line, folder in zip(lines, (workdir, f"{workdir}-experts", f"{workdir}-text"), strict=True):
        words = shlex.split(line)
        flags = [word.lstrip("-").partition("=")[0] for word in words if word.startswith("-")]
        assert len(flags) == len(set(flags)), line
        text = " ".join(words)
        assert f"--workdir={folder}" in text or f"--workdir {folder}" in text, line
        assert "config" in flags and ("--config.seed" in given) == ("config.seed" in flags), line
