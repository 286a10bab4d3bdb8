"""A small trained workdir, and helpers that compare and change it."""

import hashlib
import json
import shutil
import signal
from pathlib import Path

import numpy as np
from small_run import flags

from moe_jax.checkpoint import array_digest, named_leaves
from moe_jax.cli.train import main
from moe_jax.files import seals
from moe_jax.model.layout import to_layers
from moe_jax.parallel.distributed import DONE
from moe_jax.pretrained.loaded_model import LoadedModel

STEPS = (4, 8)  # steps with a checkpoint
# A router with state that changes enough to alter assignments.  Scanned layers compile faster.
OVERRIDES = {
    "model.moe.every": 1,
    "model.scan_layers": True,
    "model.moe.router": "sigmoid_bias",
    "model.moe.options.sigmoid_bias.update_rate": 0.01,
    "checkpoint.every_steps": 4,
    "eval.rows": 32,
    "eval.samples": 0,
    "train.steps": STEPS[-1],
}


def train(workdir: Path, files: str, **overrides: object) -> None:
    """Train in this process, on all of its devices."""
    before = signal.getsignal(signal.SIGTERM)
    assert main(["train", *flags(workdir, files, **OVERRIDES | overrides)]) == DONE
    signal.signal(signal.SIGTERM, before)


def digest(loaded: LoadedModel) -> str:
    """`Checkpoints.digest` of the parameters in memory."""
    leaves = named_leaves(to_layers(loaded.params, loaded.model.layout))
    return array_digest((name, np.asarray(leaves[name])) for name in sorted(leaves))


def files_of(folder: Path) -> dict[str, tuple[int, str]]:
    """Name -> (time of the last change, SHA-256) of everything below a folder."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in sorted(folder.rglob("*"))
    }


def copy_with(workdir: Path, target: Path, **sections: dict[str, object]) -> Path:
    """A copy with other values in config.json: `copy_with(a, b, model={"width": 64})`."""
    shutil.copytree(workdir, target)
    config = json.loads((target / "config.json").read_text())
    for name, values in sections.items():
        config[name] |= values
    (target / "config.json").write_text(json.dumps(seals.sealed(config)))
    return target


def tokens(rows: int, length: int = 16) -> np.ndarray:
    """Random token ids [rows, length]."""
    return np.random.default_rng(0).integers(0, 256, (rows, length))
