"""Loads a config from a Python file that defines get_config()."""

import contextlib
import inspect
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any, cast

from ml_collections import ConfigDict, FrozenConfigDict

from moe_jax.config import Config, from_config_dict, is_group, plain_dict, refuse_renamed
from moe_jax.errors import UserError
from moe_jax.files.python_file import blame, read_function, reads_argument
from moe_jax.moe.dispatch import DISPATCH
from moe_jax.moe.routers import ROUTERS
from moe_jax.registry import dotted_keys, suggest_key


def load_config(path: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """Load the config of a file such as configs/tiny.py, as `python -m moe_jax train` does.

    Args:
      path: FILE.py, or FILE.py:ARG for `get_config(ARG)`.  The file is executed.
      overrides: keys to set: {"train.steps": 200} is --config.train.steps=200; None: no keys.

    Returns:
      The typed config.

    Raises:
      UserError: the file is missing, has no `get_config` or raises an error; or a key is unknown or
        a value invalid.
    """
    config = read_config_file(path)
    for name, value in (overrides or {}).items():
        value_of(config, name)
        *above, last = name.split(".")
        node: Any = config
        for key in above:
            node = node[key]
        try:
            node[last] = value
        except (TypeError, ValueError) as error:  # ml_collections fixes the type of each value
            text = " ".join(str(error).split()).rstrip(".")
            raise UserError(f"config.{name} cannot be {value!r}: {text}.") from None
    return from_config_dict(config)


def value_of(config: ConfigDict, name: str) -> Any:
    """Look up the value of a key that can be set.

    Args:
      config: the config that a config file returned.
      name: dotted key, such as `train.steps`.

    Returns:
      A plain value: a dict for a key such as data.mixture.

    Raises:
      UserError: the config does not have the key, or it is a group of keys.
    """
    node: Any = plain_dict(config)
    known, above = list(dotted_keys(node)), "config"
    for key in name.split("."):
        if not isinstance(node, dict):
            raise UserError(f"{above} is a value and has no key {key!r}.")
        if key not in node:
            refuse_renamed(name)
            raise UserError(f"config.{name} is not a config key{suggest_key(name, known)}.")
        node, above = node[key], f"{above}.{key}"
    if isinstance(node, dict) and is_group(name):
        raise UserError(
            f"{above} is a group of keys and takes no value: set a key of it, such as "
            f"{above}.{next(iter(node), 'KEY')}."
        )
    return node


def read_config_file(path: str) -> ConfigDict:
    """Run FILE.py[:ARG] and return the ConfigDict of its `get_config`.

    Args:
      path: path of the file; a leading `~` is the user's home folder.

    Raises:
      UserError: the file is missing, has no get_config, raises or exits; the argument is missing or
        is never read; or get_config does not return a ConfigDict.
    """
    file, _, argument = os.path.expanduser(path).partition(":")
    flag = f"--config={path}"
    get_config = read_function(file, "get_config", flag)
    _check_argument(get_config, argument, file, flag)
    with blame(file, flag):
        config = get_config(argument) if argument else get_config()
    if not isinstance(config, ConfigDict):
        raise UserError(f"{flag}: get_config() returns {type(config).__name__}, not a ConfigDict.")
    if isinstance(config, FrozenConfigDict):  # overrides must be able to change it
        return ConfigDict(cast(Any, config))
    return config


def _check_argument(get_config: Callable[..., Any], argument: str, file: str, flag: str) -> None:
    """Raise UserError for an argument that get_config does not take, never reads, or lacks."""
    try:
        signature = inspect.signature(get_config)
    except (TypeError, ValueError):  # a callable without a readable signature
        return
    try:
        signature.bind(*[argument] if argument else [])
    except TypeError as error:
        what = f"{flag}: get_config() of {file!r}"
        if not argument:
            raise UserError(f"{what} needs an argument ({error}): write {file}:ARG.") from None
        if not signature.parameters:
            raise UserError(f"{what} takes no argument: leave out ':{argument}'.") from None
        raise UserError(f"{what} cannot take one argument ({error}): change it.") from None
    if argument and not reads_argument(get_config):
        raise UserError(
            f"{flag}: get_config() of {file!r} ignores its argument: leave out ':{argument}'."
        )


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Isolate the config files run in the body from those run afterwards.

    The tables of routers and dispatch paths are restored.  Modules with a config's own code are
    removed, so the next file that needs them imports them again, and they register their names
    again.
    """
    tables = [(table, dict(table)) for table in (ROUTERS, DISPATCH)]
    imported = {_package(name) for name in sys.modules}
    try:
        yield
    finally:
        registered = {_package(kind.__module__) for table, _ in tables for kind in table.values()}
        for table, before in tables:
            table.clear()
            table.update(before)
        for name, module in list(sys.modules.items()):
            package = _package(name)
            if package not in imported and (package in registered or not _installed(module)):
                del sys.modules[name]


def _package(module: str) -> str:
    return module.partition(".")[0]


def _installed(module: ModuleType) -> bool:
    """True for a module of Python or an installed package, which may fail if imported twice."""
    # A folder without __init__.py has no file but a path; a built-in module has neither.
    file: str | None = getattr(module, "__file__", None)
    places: Iterable[str] = [file] if file else getattr(module, "__path__", ())
    folders = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    inside = tuple(os.path.realpath(folder) + os.sep for folder in folders)
    return all(os.path.realpath(place).startswith(inside) for place in places)
