"""A start after the first compiles nothing, even with a larger number of steps."""

import collections

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from small_run import ONE_LAYER, flags, write_corpus

from moe_jax.cli import train
from moe_jax.parallel.distributed import DONE

SMALL = ONE_LAYER | {"model.width": 16, "train.steps": 2, "precision": "bfloat16"}


@pytest.fixture
def started(tmp_path, monkeypatch):
    """`started(name, **overrides)` trains like a new process; returns JAX's counts."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_compilation_cache_max_size
    files = write_corpus(tmp_path / "text")
    seen = collections.Counter()

    def count(event: str, **_: object) -> None:
        seen[event.rsplit("/", 1)[-1]] += 1

    def start(name: str, **overrides: object) -> collections.Counter:
        jax.clear_caches()
        compilation_cache.reset_cache()
        seen.clear()
        given = {"compile_cache.dir": tmp_path / "programs"} | SMALL | overrides
        assert train.main(["train", *flags(tmp_path / name, files, **given)]) == DONE
        return seen.copy()

    jax.monitoring.register_event_listener(count)
    yield start
    jax.monitoring.unregister_event_listener(count)
    for name, value in zip(("dir", "max_size"), before, strict=True):
        jax.config.update(f"jax_compilation_cache_{name}", value)
    compilation_cache.reset_cache()


@pytest.mark.parametrize(
    "layers",
    [
        {},
        pytest.param({"model.num_layers": 3, "model.scan_layers": True}, marks=pytest.mark.full),
    ],
)
def test_later_starts_compile_nothing(started, capsys, layers):
    first = started("run", **layers)
    assert first["cache_misses"] > 5 and not first["cache_hits"]
    assert "compiled the train step in " in capsys.readouterr().out
    longer = started("run", **layers, **{"train.steps": 4})
    assert longer["cache_hits"] and not longer["cache_misses"]
    assert "read the compiled train step in " in capsys.readouterr().out
    again = started("other", **layers)
    assert again["cache_hits"] and not again["cache_misses"]
