"""Fixtures: a small corpus, and stores with shards of a few tokens."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_jax.data.build import ChunkSizes, build_store
from moe_jax.data.config import DataConfig
from moe_jax.data.store import Store

SMALL = ChunkSizes(chunk=64, shard=512)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Write 40 files of 0 to 60 words, some of them not ASCII, in two folders."""
    rng = random.Random(0)
    words = ["expert", "route", "gate", "größe", "日本", "x", "tokens\n", "🙂"]
    for i in range(40):
        folder = tmp_path / "corpus" / ("a" if i % 2 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        text = f"{i} " + " ".join(rng.choices(words, k=rng.randrange(60)))
        (folder / f"{i:02d}.txt").write_text(text, encoding="utf-8")
    return tmp_path / "corpus"


@pytest.fixture
def config(corpus: Path) -> DataConfig:
    """The corpus as text, a fifth of it held out."""
    return DataConfig(source="text", files=f"{corpus}/*/*.txt", heldout_fraction=0.2)


@pytest.fixture
def store(config: DataConfig, tmp_path: Path) -> Store:
    """The corpus as a store."""
    return build_store(config, tmp_path / "stores", layout=SMALL)


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., Store]:
    """The function `make_store(a=[text, ...], b=[...])` builds a store that mixes these streams."""

    def make(weights: dict[str, float] | None = None, **streams: list[str]) -> Store:
        mixture = {}
        for name, texts in streams.items():
            folder = tmp_path / "mixed" / name
            folder.mkdir(parents=True)
            for i, text in enumerate(texts):
                (folder / f"{i:03d}.txt").write_bytes(text.encode())
            mixture[name] = {"files": f"{folder}/*.txt", "weight": (weights or {}).get(name, 1.0)}
        made = DataConfig(mixture=mixture, heldout_fraction=0.2)
        return build_store(made, tmp_path / "mixed_stores", layout=SMALL)

    return make
