"""Checks that all processes of a run have the same config, flags, packages and text."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from moe_jax.config import Config, to_flat_dict
from moe_jax.errors import UserError
from moe_jax.parallel import exchange
from moe_jax.record.provenance import package_versions
from moe_jax.run.context import Run
from moe_jax.run.resume import data_record

# JAX settings that change numbers or programs, whether the environment or a caller sets them.
_OF_JAX = (
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_threefry_partitionable",
)
_OF_COMPILERS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_OF_ONE_HOST = ("--xla_dump", "--xla_force_host_platform_device_count")
NAMED = 3  # differences that a message names
LONGEST = 80  # characters of a value in a message
_PARTS = {
    "content": "the fingerprint of the text without its file names",
    "tokenizer": "the SHA-256 of the tokenizer",
    "streams": "the list of streams",
    "documents": "the number of documents",
    "tokens": "the number of tokens",
}
_TEXT = "the fingerprint of the text (data.files, data.mixture)"


def check_start(config: Config | None, flags: Mapping[str, Any]) -> None:
    """Check that all processes were started with the same config, flags and environment.

    Every process must call this before any process touches a device.

    Args:
      config: as written; None: the command has no config.
      flags: values that must be equal on all processes, by flag name.

    Raises:
      UserError: the processes differ; every process raises the same message, which says what
        differs and on which processes.
    """
    mine = {f"config.{key}": value for key, value in _flat(config).items()}
    mine |= {f"--{name}": value for name, value in flags.items()}
    mine |= {f"the version of {name}": found for name, found in package_versions().items()}
    mine |= _settings()
    advice = "start all processes with the same command, packages and environment"
    _check("start", mine, advice)


def check_run(run: Run, on_progress: Callable[[], None]) -> None:
    """Check that all processes have the same resolved config and the same text.

    Every process must call this before the first collective.  The text is not read again: the
    store holds its fingerprint.

    Args:
      run: what this process has prepared.
      on_progress: called whenever a process that this one waits for makes progress with its text.

    Raises:
      UserError: the processes differ; every process raises the same message, which says what
        differs and on which processes.
    """
    mine = {_TEXT: run.store.fingerprint}
    mine |= {_PARTS[name]: value for name, value in data_record(run.store).items()}
    mine |= {f"config.{key}, resolved,": value for key, value in _flat(run.config).items()}
    _check("run", mine, "give all processes the same files, tokenizer and --workdir", on_progress)


def difference(everyone: Sequence[Mapping[str, Any]]) -> str:
    """Name the keys whose values differ between processes.

    Args:
      everyone: one mapping per process, in process order.

    Returns:
      `config.seed is 1 on process 0 and 2 on processes 1, 2` for each of the first NAMED keys;
      empty if all mappings are equal.
    """
    said, more = [], 0
    for key in dict.fromkeys(key for one in everyone for key in one):
        holders: dict[str, list[int]] = {}
        for process, one in enumerate(everyone):
            value = repr(one[key]) if key in one else "not set"
            holders.setdefault(value, []).append(process)
        if len(holders) == 1:
            continue
        if len(said) == NAMED:
            more += 1
            continue
        parts = [f"{_short(value)} on {_processes(which)}" for value, which in holders.items()]
        said.append(f"{key} is {' and '.join(parts)}")
    return ", ".join(said) + (f", and {more} more differ" if more else "")


def _settings() -> dict[str, str]:
    """Settings outside the config that change numbers or programs."""
    found = {name.upper(): repr(getattr(jax.config, name, None)) for name in _OF_JAX}
    for name in _OF_COMPILERS:
        flags = os.environ.get(name, "").split()
        found[name] = " ".join(sorted(flag for flag in flags if not flag.startswith(_OF_ONE_HOST)))
    return found


def _check(
    name: str, mine: Mapping[str, Any], advice: str, on_progress: Callable[[], None] = lambda: None
) -> None:
    text = json.dumps(mine)
    digest = hashlib.sha256(text.encode()).hexdigest()
    digests = exchange.gather(f"{name}/digests", digest, on_progress)
    if len(set(digests)) == 1:
        return
    everyone = [json.loads(one) for one in exchange.gather(f"{name}/values", text)]
    exchange.leave()
    raise UserError(f"{difference(everyone)}: {advice}.")


def _flat(config: Config | None) -> dict[str, Any]:
    return {} if config is None else to_flat_dict(config)


def _processes(which: Sequence[int]) -> str:
    return f"process{'es' if len(which) > 1 else ''} {', '.join(map(str, which))}"


def _short(value: str) -> str:
    return value if len(value) <= LONGEST else f"{value[:LONGEST]}..."
