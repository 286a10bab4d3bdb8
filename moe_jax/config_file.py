"""A config from the Python file that makes it."""

import importlib.util
import inspect
import os
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from moe_jax.config import Config, from_config_dict
from moe_jax.errors import UserError
from moe_jax.registry import suggest


def load_config(path: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """The config of a file such as configs/tiny.py, as `python -m moe_jax train` reads it.

    Args:
      path: FILE.py, or FILE.py:ARG for `get_config(ARG)`.  The file is run.
      overrides: {"train.steps": 200}: keys to set, as --config.train.steps=200 does; None: none.

    Returns:
      The typed config.

    Raises:
      UserError: no such file, no `get_config` in it, an unknown key, or a bad value.
    """
    config = read_config_file(path)
    for name, value in (overrides or {}).items():
        *above, last = name.split(".")
        node: Any = config
        for key in above:
            node = node[key] if isinstance(node, ConfigDict) and key in node else None
        if not isinstance(node, ConfigDict) or last not in node:
            raise UserError(f"{name} is not a config key{suggest(name, config.to_dict())}.")
        node[last] = value
    return from_config_dict(config)


def read_config_file(path: str) -> ConfigDict:
    """What `get_config` of FILE.py[:ARG] returns; an exception inside the file is not caught.

    Raises:
      UserError: no such file, no get_config in it, or it returns something else.
    """
    file, _, argument = path.partition(":")
    if not os.path.isfile(file):
        raise UserError(f"--config={path}: there is no file {file!r}.")
    spec = importlib.util.spec_from_file_location("moe_jax_run_config", file)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path}: {file!r} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(f"--config={path}: {file!r} defines no get_config().")
    if argument and not inspect.signature(get_config).parameters:
        raise UserError(f"--config={path}: get_config() of {file!r} takes no argument.")
    config = get_config(argument) if argument else get_config()
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"--config={path}: get_config() returns {type(config).__name__}, not a ConfigDict."
        )
    return config
