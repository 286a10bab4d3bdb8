"""Turns text into batches: a store, built once, and rows as a function of (seed, step, row).

Names are imported when they are first used, so that a config alone does not need TensorStore.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_jax.data.batch import Batch
    from moe_jax.data.build import build_store
    from moe_jax.data.config import DataConfig
    from moe_jax.data.feed import DeviceFeed, put_batch
    from moe_jax.data.pipeline import Batches, HeldOut
    from moe_jax.data.store import Store
    from moe_jax.data.tokenizers import load_tokenizer

_HOME = {
    "Batch": "batch",
    "Batches": "pipeline",
    "DataConfig": "config",
    "DeviceFeed": "feed",
    "HeldOut": "pipeline",
    "Store": "store",
    "build_store": "build",
    "load_tokenizer": "tokenizers",
    "put_batch": "feed",
}

__all__ = [
    "Batch",
    "Batches",
    "DataConfig",
    "DeviceFeed",
    "HeldOut",
    "Store",
    "build_store",
    "load_tokenizer",
    "put_batch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moe_jax.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moe_jax.data.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
