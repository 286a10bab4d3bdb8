"""A workdir that an earlier version of this package wrote.

tests/golden/workdir.tar.xz holds, with sorted names and without owners and times:

- run/, texts/ and stores/ as commit 318a67f wrote them on two virtual CPU devices (version 0.1.0,
  before the package got its present folders), without the checkpoint of step 8;
- expected.json: the rows, without times, that the same commit wrote for steps 5 to 8 from the
  checkpoint of step 4 under COMPILER.  For these rows `make_schedule` was changed to today's cosine
  (first step above 0, last one at final_share), because a resumed run uses it.
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
# The compiler settings under which the file was written.  The results depend on them to the bit, so
# the tests set them.
COMPILER = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "True", "XLA_FLAGS": ""}


def unpack(folder: Path) -> Path:
    """Unpack run/, texts/, stores/ and expected.json into `folder`."""
    with tarfile.open(ROOT / "tests" / "golden" / "workdir.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def overrides(folder: Path) -> dict[str, Any]:
    """The --config.* flags of the run; paths of texts and store are relative to `folder`.

    eval.batches (1 batch of 4 rows) has since been replaced by eval.rows.
    """
    given = json.loads((folder / "run" / "overrides.json").read_text())
    assert given.pop("eval.batches") == 1
    return given | {"eval.rows": given["train.batch_size"]}


def config_of(folder: Path) -> Config:
    """The config of the run: configs/tiny.py with those flags."""
    config = read_config_file(str(ROOT / "configs" / "tiny.py"))
    config.update_from_flattened_dict(overrides(folder))
    return from_config_dict(config)
