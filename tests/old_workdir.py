"""A workdir that an earlier version of this package wrote.

tests/golden/workdir.tar.xz holds, with sorted names and without owners and times: run/, texts/ and
stores/ as commit 318a67f left them on two virtual CPU devices (version 0.1.0, before the package
was cut into its present folders), without the checkpoint of step 8; and expected.json, what that
commit made of steps 5 to 8 from the checkpoint of step 4 under COMPILER (rows without times), with
one change: `make_schedule` gave the rates of today's cosine (first step above 0, last one at
final_share), because a run that resumes has those.
"""

import json
import tarfile
from pathlib import Path
from typing import Any

from small_run import ROOT

from moe_jax.config import Config, from_config_dict
from moe_jax.config_file import read_config_file

DEVICES = 2
STEP = 4  # of its checkpoint
# Decides the bits, so the tests set it: whatever else the suite runs under, this wrote the file.
COMPILER = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "True", "XLA_FLAGS": ""}


def unpack(folder: Path) -> Path:
    """Writes run/, texts/, stores/ and expected.json into `folder`."""
    with tarfile.open(ROOT / "tests" / "golden" / "workdir.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def overrides(folder: Path) -> dict[str, Any]:
    """--config.* flags of the run; texts and store by paths relative to `folder`.

    One key has another name since: a batch of 4 rows was evaluated.
    """
    given = json.loads((folder / "run" / "overrides.json").read_text())
    assert given.pop("eval.batches") == 1
    return given | {"eval.rows": given["train.batch_size"]}


def config_of(folder: Path) -> Config:
    """The config that these flags make of configs/tiny.py."""
    config = read_config_file(str(ROOT / "configs" / "tiny.py"))
    config.update_from_flattened_dict(overrides(folder))
    return from_config_dict(config)
