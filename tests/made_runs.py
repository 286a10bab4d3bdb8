"""Writes workdirs of finished runs without training."""

import json
from pathlib import Path

from small_run import small_config

from moe_jax.config import Config, to_json


def config(**overrides: object) -> Config:
    return small_config("*.txt", **{"model.vocab_size": 258, "train.steps": 8} | overrides)


def train_row(step: int, loss: float, speed: float = 100.0, drop: float = 0.0) -> dict:
    return {
        "step": step,
        "loss": loss + 0.5,
        "lm_loss": loss,
        "tokens_per_second": speed,
        "drop_fraction": drop,
    }


def write_run(folder: Path, config: Config | None, rows: list[dict] | None, tail: str = "") -> None:
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.json").write_text(to_json(config))
    if rows is not None:
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows) + tail)


FINISHED = [
    train_row(1, 6.0, speed=10.0, drop=0.5),
    train_row(4, 3.0, speed=90.0, drop=0.25),
    {"step": 4, "eval_loss": 2.5},
    train_row(8, 2.0, speed=110.0, drop=0.0),
    {"step": 8, "eval_loss": 2.75},
]
