"""Parses the command line of every console command: flags, a config file and its overrides."""

import ast
import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from moe_jax.cli.commands import COMMON_FLAGS, PROCESS_FLAGS, REGISTRATIONS, Command
from moe_jax.cli.mixture import add_mixture_keys
from moe_jax.config import plain_dict
from moe_jax.config_file import read_config_file, value_of
from moe_jax.errors import UserError
from moe_jax.files import json_files
from moe_jax.parallel.xla_flags import avoid_command_buffers, use_virtual_devices
from moe_jax.registry import dotted_keys, suggest_key


class Parsed(NamedTuple):
    """A parsed command line."""

    config: ConfigDict  # empty if no config file is named
    overrides: dict[str, Any]  # {"train.steps": 200}, as given on the command line
    flags: Any  # attributes: config (FILE.py[:ARG]), workdir, devices, and the command's own flags


MOST_DEVICES = 1 << 16  # virtual devices, as many as the planner's largest topology has
_DEFINE = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_boolean,
}


def parse(argv: Sequence[str], command: Command) -> Parsed:
    """Read a command line and apply --devices; call it before JAX initialises its devices.

    Args:
      argv: the program's name and its arguments.
      command: the command, with the flags that it takes.

    Raises:
      UserError: anything wrong with the arguments or with the config file.
    """
    known = [*COMMON_FLAGS, *command.flags]
    values = flags.FlagValues()
    for flag in known:
        _DEFINE[type(flag.default)](flag.name, flag.default, flag.help, flag_values=values)
    arguments = [*argv[:1], *_expand_flag_files(values, argv[1:])]
    path, loaded = "", ConfigDict()
    if command.config:
        path, arguments = _split_config(arguments, [flag.name for flag in known])
        loaded = read_config_file(path)
        add_mixture_keys(loaded, arguments)
        arguments = list(_checked_overrides(loaded, arguments))
    stray = _read(values, arguments, loaded if command.config else None)
    if stray:
        raise UserError(f"{stray[0]!r} is not a flag: write --NAME=VALUE.")
    found = SimpleNamespace(**{flag.name: values[flag.name].value for flag in known})
    for flag in known:
        if flag.path:
            setattr(found, flag.name, _at_home(flag.name, getattr(found, flag.name)))
    if command.workdir and not found.workdir:
        raise UserError("--workdir is missing: set it to the directory of the run.")
    if not 0 <= found.devices <= MOST_DEVICES:
        raise UserError(
            f"--devices={found.devices}: give 1 to {MOST_DEVICES}, or 0 for the real devices."
        )
    if found.devices:
        use_virtual_devices(found.devices)
    avoid_command_buffers()
    if not command.config:
        if REGISTRATIONS in command.flags and found.config:
            loaded = read_config_file(found.config)
        return Parsed(loaded, {}, found)
    found.config = path
    given = config_flags.get_override_values(values["config"])
    overrides = {
        key: plain_dict(value) if isinstance(value, ConfigDict) else value
        for key, value in given.items()
    }
    return Parsed(loaded, overrides, found)


def process_flags(argv: Sequence[str]) -> SimpleNamespace:
    """Read the flags of PROCESS_FLAGS from a command line that `parse` refuses.

    A flag that cannot be read has its default.
    """
    found = {flag.name: flag.default for flag in PROCESS_FLAGS}
    arguments = iter(argv[1:])
    for argument in arguments:
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name in found:
            with contextlib.suppress(ValueError):
                found[name] = type(found[name])(value if equals else next(arguments, ""))
    return SimpleNamespace(**found)


def _at_home(name: str, path: str) -> str:
    """Expand a leading `~` or `~user`; raises UserError if there is no such user."""
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise UserError(f"--{name}={path}: there is no such user. For a file, write ./{path}.")
    return found


def _split_config(argv: Sequence[str], known: Iterable[str]) -> tuple[str, list[str]]:
    """The value of --config, and the other arguments; `known`: the names of the other flags."""
    path, rest = "", []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            path = value if equals else next(arguments, "")
        else:
            rest.append(argument)
    if not path:
        _check_names(rest[1:], ["config", *known])
        raise UserError("--config is missing: set it to a config file, such as configs/tiny.py.")
    return path, rest


def _check_names(argv: Sequence[str], known: Sequence[str]) -> None:
    """Raise UserError for the first flag not in `known`, because --config may be misspelt."""
    for argument in argv:
        match = re.match(r"--?([A-Za-z][^=.]*)", argument)
        if match and match[1] not in known and match[1].removeprefix("no") not in known:
            raise UserError(f"--{match[1]} is not a flag{suggest_key(match[1], known)}.")


def _checked_overrides(config: ConfigDict, argv: Sequence[str]) -> Iterator[str]:
    """The arguments, with the JSON of a mapping as the Python literal that ml_collections reads.

    Raises:
      UserError: a key that `config` does not have or that is a section, or a mapping whose value
        is not a JSON object.
    """
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        match = re.fullmatch(r"--?(no)?config\.(.*)", name)
        if match and isinstance(value_of(config, match[2]), dict) and not match[1]:
            text = value if equals else next(arguments, "")
            yield f"{name}={_mapping_literal(name, text)}"
        else:
            yield argument


def _mapping_literal(name: str, text: str) -> str:
    """Convert a mapping, given as a JSON object or a Python literal, to a Python literal."""
    try:
        value = json_files.parse(text)
    except ValueError as error:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise UserError(
                f"{name}={text} is not JSON ({error}): write it as '{{\"KEY\": VALUE}}'."
            ) from None
    if not isinstance(value, dict):
        raise UserError(f"{name}={text} is not a JSON object: write it as '{{\"KEY\": VALUE}}'.")
    literal = repr(value)
    try:
        ConfigDict(ast.literal_eval(literal))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise UserError(
            f"{name}={text} cannot be part of a config: use strings without dots as keys, finite "
            f"numbers, and few levels."
        ) from None
    return literal


def _expand_flag_files(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """The arguments, with each --flagfile replaced by the arguments in that file."""
    try:
        return values.read_flags_from_files(argv, force_gnu=False)
    except flags.Error as error:
        raise UserError(f"--flagfile: {str(error).removeprefix('ERROR:: ').rstrip('.')}.") from None


def _read(values: flags.FlagValues, argv: list[str], config: ConfigDict | None) -> list[str]:
    """Parse `argv` into `values` and `config`; return the arguments that are not flags."""
    known = [*values, *(f"config.{key}" for key in dotted_keys(plain_dict(config or ConfigDict())))]
    try:
        if config is not None:
            config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        return values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        near = suggest_key(error.flagname, known)
        raise UserError(f"--{error.flagname} is not a flag{near}.") from None
    except flags.IllegalFlagValueError as error:
        # The message of absl is "flag --NAME=VALUE: REASON".
        given = str(error).removeprefix("flag ").split(": ")[0]
        name = given.removeprefix("--").split("=")[0]
        kind = values[name].flag_type() if name in values else "another type"
        raise UserError(f"{given} is not valid: give a value of type {kind}.") from None
    except flags.Error as error:
        raise UserError(f"{str(error).splitlines()[0].rstrip('.')}.") from None
