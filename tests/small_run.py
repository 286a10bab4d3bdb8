"""Runs small enough for tests: their corpus, flags, config and rows."""

import json
import random
from pathlib import Path

from moe_jax.config import Config, from_config_dict
from moe_jax.config_file import read_config_file

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("the", "model", "reads", "a", "small", "text", "and", "learns", "which", "word", "follows")

# Overrides that shrink configs/tiny.py until it compiles in seconds.  Every step is logged, so that
# runs can be compared.
SMALL = {
    "model.num_layers": 2,
    "model.width": 32,
    "model.num_heads": 2,
    "model.num_kv_heads": 2,
    "model.head_dim": 16,
    "model.ffn_width": 64,
    "model.moe.expert_width": 32,
    "model.moe.every": 2,
    "model.moe.group_rows": 0,
    "data.source": "text",
    "data.sequence_length": 32,
    "optimizer.learning_rate": 3e-3,
    "optimizer.warmup_steps": 0,  # valid for a run of any length
    "train.steps": 8,
    "train.log_every": 1,
    "eval.every": 0,
    "eval.rows": 64,
    "eval.samples": 1,
    "eval.sample_tokens": 8,
    "checkpoint.every_steps": 0,
}

# For tests that need no dense layer: half as much to compile.
ONE_LAYER = {"model.num_layers": 1, "model.moe.every": 1}

# Compiler options for a step whose float64 must be exact to rounding.  At level 0, the tests'
# default, results have nine correct digits.  At level 1 the losses of 20 steps differ by at most
# 2e-15 from those at XLA's default level, and compiling takes half as long as there.
EXACT = {"xla_backend_optimization_level": 1}


def write_corpus(folder: Path, documents: int = 64) -> str:
    """Write text files of words in a fixed random order; returns their glob."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for number in range(documents):
        text = " ".join(draw.choice(WORDS) for _ in range(100 + number))
        (folder / f"{number:03d}.txt").write_text(f"{text}\n")
    return str(folder / "*.txt")


def flags(workdir: Path, files: str, **overrides: object) -> list[str]:
    """The arguments of `moe_jax train` for a small run; `train__steps=3` sets train.steps."""
    values = SMALL | {"data.files": files} | _dotted(overrides)
    return [
        f"--config={ROOT / 'configs' / 'tiny.py'}",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in values.items()),
    ]


def small_config(files: str, **overrides: object) -> Config:
    """The typed config of the same run."""
    config = read_config_file(str(ROOT / "configs" / "tiny.py"))
    values = SMALL | {"data.files": files} | _dotted(overrides)
    config.update_from_flattened_dict(values)
    return from_config_dict(config)


def rows(workdir: Path) -> list[dict]:
    """All rows of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def train_rows(workdir: Path) -> list[dict]:
    """The rows of train steps."""
    return [row for row in rows(workdir) if "loss" in row]


def eval_rows(workdir: Path) -> list[dict]:
    """The rows of held-out evaluations."""
    return [row for row in rows(workdir) if "eval_loss" in row]


def _dotted(overrides: dict[str, object]) -> dict[str, object]:
    return {name.replace("__", "."): value for name, value in overrides.items()}
