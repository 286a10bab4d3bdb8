"""The command line of every console command: absl flags, a config file and its overrides."""

import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from moe_jax.cli.commands import COMMON_FLAGS, Command
from moe_jax.cli.mixture import add_mixture_keys
from moe_jax.config import refuse_renamed
from moe_jax.config_file import read_config_file
from moe_jax.errors import UserError
from moe_jax.parallel.xla_flags import avoid_command_buffers, use_virtual_devices
from moe_jax.registry import suggest


class Parsed(NamedTuple):
    """What `parse` found."""

    config: ConfigDict  # empty for a command without --config
    overrides: dict[str, Any]  # {"train.steps": 200}, as given on the command line
    flags: Any  # values by attribute: config (FILE.py[:ARG]), workdir, devices, the extra ones


_DEFINE = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_boolean,
}


def parse(argv: Sequence[str], command: Command) -> Parsed:
    """Reads a command line and applies --devices; call it before anything touches a device.

    Args:
      argv: the program's name and its arguments.
      command: what it takes.

    Raises:
      UserError: anything wrong with the arguments or with the config file.
    """
    known = [*COMMON_FLAGS, *command.flags]
    values = flags.FlagValues()
    for flag in known:
        _DEFINE[type(flag.default)](flag.name, flag.default, flag.help, flag_values=values)
    arguments = list(argv)
    path, loaded = "", ConfigDict()
    if command.config:
        path, arguments = _split_config(arguments)
        loaded = read_config_file(path)
        add_mixture_keys(loaded, arguments)
        _check_keys(loaded, arguments)
        config_flags.DEFINE_config_dict("config", loaded, flag_values=values, sys_argv=arguments)
    stray = _read(values, arguments)
    if stray:
        raise UserError(f"{stray[0]!r} is not a flag: write --NAME=VALUE.")
    found = SimpleNamespace(**{flag.name: values[flag.name].value for flag in known})
    if command.workdir and not found.workdir:
        raise UserError("--workdir is missing: name the folder of the run.")
    if found.devices < 0:
        raise UserError(f"--devices={found.devices}: give 1 or more, or 0 for the machine's own.")
    if found.devices:
        use_virtual_devices(found.devices)
    avoid_command_buffers()
    if not command.config:
        return Parsed(loaded, {}, found)
    found.config = path
    overrides = dict(config_flags.get_override_values(values["config"]))
    return Parsed(loaded, overrides, found)


def _split_config(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The value of --config and the arguments without it."""
    path, rest = "", []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            path = value if equals else next(arguments, "")
        else:
            rest.append(argument)
    if not path:
        raise UserError("--config is missing: name a config file, such as configs/tiny.py.")
    return path, rest


def _check_keys(config: ConfigDict, argv: Sequence[str]) -> None:
    """Raises UserError for an override of a key that the config does not have."""
    for argument in argv:
        match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        node: Any = config
        above = "config"
        for key in match[1].split(".") if match else ():
            if not isinstance(node, ConfigDict):
                raise UserError(f"{above} is a value and has no key {key!r}.")
            if key not in node:
                refuse_renamed(f"{above}.{key}".removeprefix("config."))
                raise UserError(f"{above}.{key} is not a config key{suggest(key, node)}.")
            node, above = node[key], f"{above}.{key}"


def _read(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Parses `argv` into `values`; returns what is no flag."""
    try:
        return values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        raise UserError(
            f"--{error.flagname} is not a flag{suggest(error.flagname, _own(values))}."
        ) from None
    except flags.IllegalFlagValueError as error:
        # absl says: flag --NAME=VALUE: what its parser thought of it
        given = str(error).removeprefix("flag ").split(": ")[0]
        name = given.removeprefix("--").split("=")[0]
        kind = values[name].flag_type() if name in values else "another type"
        raise UserError(f"{given} is not valid: give a value of type {kind}.") from None
    except flags.Error as error:
        raise UserError(f"{str(error).splitlines()[0].rstrip('.')}.") from None


def _own(values: flags.FlagValues) -> list[str]:
    """Names of the command's flags; absl counts each override of the config as one, too."""
    return [name for name in values if not name.startswith("config.")]
