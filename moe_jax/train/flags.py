"""The command line of every console command: absl flags, a config file and its overrides."""

import dataclasses
import importlib.util
import inspect
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from moe_jax.errors import UserError
from moe_jax.parallel.distributed import AGAIN, FIX, lost_peer
from moe_jax.parallel.xla_flags import avoid_command_buffers
from moe_jax.registry import suggest


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag of a command; its type is the type of its default."""

    name: str
    default: str | int | float | bool
    help: str


class Parsed(NamedTuple):
    """What `parse` found."""

    config: ConfigDict  # empty for a command without --config
    overrides: dict[str, Any]  # {"train.steps": 200}, as given on the command line
    flags: Any  # values by attribute: config (FILE.py[:ARG]), workdir, devices, the extra ones


# For commands that may run as several processes: what `distributed.start` takes.
PROCESS_FLAGS = (
    Flag("coordinator", "", "HOST:PORT of process 0, for several processes started by hand."),
    Flag("process_count", 0, "How many processes; 1 ignores what the environment says."),
    Flag("process_id", -1, "Which process this is, from 0."),
)
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
_COMMON = (
    Flag("workdir", "", "Folder of the run."),
    Flag("devices", 0, "Run on this many virtual CPU devices; 0: the machine's own."),
)
_DEFINE = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_boolean,
}


def parse(
    argv: Sequence[str], *, extra: Sequence[Flag] = (), config: bool = True, workdir: bool = True
) -> Parsed:
    """Reads a command line and applies --devices; call it before anything touches a device.

    Args:
      argv: the program's name and its arguments.
      extra: flags beside --workdir and --devices.
      config: whether the command takes --config=FILE.py[:ARG] and --config.a.b=VALUE.
      workdir: whether the command needs --workdir.

    Raises:
      UserError: anything wrong with the arguments or with the config file.
    """
    known = [*_COMMON, *extra]
    if {"--help", "-h"} & set(argv[1:]):
        _print_help(argv[0], known, config)
        sys.exit(0)
    values = flags.FlagValues()
    for flag in known:
        _DEFINE[type(flag.default)](flag.name, flag.default, flag.help, flag_values=values)
    arguments = list(argv)
    if config:
        path, arguments = _split_config(arguments)
        loaded = load_config(path)
        _check_keys(loaded, arguments)
        config_flags.DEFINE_config_dict("config", loaded, flag_values=values, sys_argv=arguments)
    stray = _read(values, arguments)
    if stray:
        raise UserError(f"{stray[0]!r} is not a flag: write --NAME=VALUE.")
    found = SimpleNamespace(**{flag.name: values[flag.name].value for flag in known})
    if workdir and not found.workdir:
        raise UserError("--workdir is missing: name the folder of the run.")
    if found.devices < 0:
        raise UserError(f"--devices={found.devices}: give 1 or more, or 0 for the machine's own.")
    if found.devices:
        use_virtual_devices(found.devices)
    avoid_command_buffers()
    if not config:
        return Parsed(ConfigDict(), {}, found)
    found.config = path
    overrides = dict(config_flags.get_override_values(values["config"]))
    return Parsed(loaded, overrides, found)


def load_config(path: str) -> ConfigDict:
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


def run(main: Callable[[Sequence[str]], int | None]) -> NoReturn:
    """Runs a command's `main(argv)` and exits: its result (None: 0), or 1 after an exception.

    A UserError is printed as its one sentence, any other exception with its traceback.  42 where
    an exception says that another process is gone.  Several processes end together: one that is
    lost before that takes the others with it, and all of them are run again.
    """
    failed, together = True, False
    threading.excepthook = _thread_failed
    try:
        code = main(sys.argv) or 0
        together = jax.distributed.is_initialized()
        jax.distributed.shutdown()  # waits for the others; alone it does nothing
        failed = False
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        code = FIX
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        code = INTERRUPTED
    except Exception as error:
        traceback.print_exc()
        code = exit_code(error)
        if code == AGAIN:
            print(f"Another process of this run is gone: exit code {code}.", file=sys.stderr)
    waits = any(not t.daemon for t in threading.enumerate() if t is not threading.main_thread())
    if together or (failed and (waits or jax.distributed.is_initialized())):
        # Where all have met at the end, one that is killed while Python takes itself apart would be
        # run again, and wait in vain for the others.  After a failure an orderly exit waits for the
        # other processes, and they wait for this one: for minutes.  So do threads of Orbax for a
        # save that could not begin.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def exit_code(error: BaseException) -> int:
    """With which code `run` ends the process after `error`."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return AGAIN if not isinstance(error, UserError) and lost_peer(error) else FIX


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


def _thread_failed(args: threading.ExceptHookArgs) -> None:
    """A full disk in a library's thread, such as TensorBoard's, is one line; the run says more."""
    if isinstance(args.exc_value, OSError):
        print(
            f"{args.thread.name if args.thread else 'A thread'}: {args.exc_value}", file=sys.stderr
        )
    else:
        threading.__excepthook__(args)


def _own(values: flags.FlagValues) -> list[str]:
    """Names of the command's flags; absl counts each override of the config as one, too."""
    return [name for name in values if not name.startswith("config.")]


def use_virtual_devices(count: int) -> None:
    """The CPU, as `count` devices; call it before anything touches a device."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def _print_help(program: str, known: Sequence[Flag], config: bool) -> None:
    print(f"usage: {os.path.basename(program)} [--FLAG=VALUE ...]\n")
    if config:
        print("  --config=FILE.py[:ARG]  config file")
        print("  --config.KEY=VALUE      override of one key of it, such as --config.train.steps=9")
    for flag in known:
        print(f"  --{flag.name}={flag.default!r}  {flag.help}")
