"""What launchers share: running commands (each is printed first), and reading options."""

import argparse
import dataclasses
import itertools
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

from moe_jax.errors import UserError

Options = TypeVar("Options")  # a dataclass of a launcher's options


def print_line(line: str) -> None:
    """Print a line.  If stdout is lost (`| head`, a full disk), started jobs keep running."""
    try:
        print(line.encode(errors="backslashreplace").decode(), flush=True)
    except UnicodeEncodeError:  # a character that this locale cannot encode
        print(ascii(line)[1:-1], flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # Python flushes its buffer at exit
        os.close(nowhere)


class LaunchError(UserError):
    """A mistake that the user must fix, in one sentence; `stderr` is that of a failed command."""

    def __init__(self, sentence: str, stderr: str = ""):
        super().__init__(sentence)
        self.stderr = stderr


@dataclasses.dataclass(frozen=True)
class Shell:
    """Runs commands given as lists of arguments, which no shell parses."""

    dry_run: bool = False  # print everything, run nothing, write nothing

    def say(self, line: str) -> None:
        """Print a line."""
        print_line(line)

    def run(self, *command: str, show: bool = False) -> str:
        """Run `command` and return its stdout, without trailing line breaks.

        With `show` the output goes straight to the screen, and the result is "".  Under dry_run the
        result is "" as well.

        Raises:
          LaunchError: there is no such program, or it failed; the sentence contains the end of its
            stderr.
        """
        self.say(f"+ {shlex.join(command)}")
        if self.dry_run:
            return ""
        pipe = None if show else subprocess.PIPE
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
            )
        except FileNotFoundError:
            raise LaunchError(f"There is no program {command[0]!r} on PATH: install it.") from None
        if done.returncode:
            stderr = done.stderr or ""
            why = " ".join(stderr.split())[-400:] or "its output gives the reason"
            raise LaunchError(
                f"{command[0]} ended with exit code {done.returncode} ({why}). Fix the cause, then "
                f"run this again.",
                stderr,
            )
        return (done.stdout or "").rstrip("\n")

    def write(self, path: Path, text: str) -> None:
        """Write a file that a command needs; under dry_run, print it instead."""
        if self.dry_run:
            self.say(f"+ write {path}:\n{text}")
            return
        self.say(f"+ write {path}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise LaunchError(
                f"{path} cannot be written ({error.strerror or error}): choose another folder."
            ) from None


def split_arguments(argv: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Split arguments at `--`: (the launcher's own, the trainer's)."""
    if "--" not in argv:
        return list(argv), ()
    border = argv.index("--")
    return list(argv[:border]), tuple(argv[border + 1 :])


def flag_of(arguments: Sequence[str], name: str) -> str:
    """Find the value of --NAME=VALUE or --NAME VALUE among a trainer's arguments; "" if absent."""
    value = ""
    for argument, following in itertools.pairwise((*arguments, "")):
        if argument.startswith(f"--{name}="):
            value = argument.partition("=")[2]
        elif argument == f"--{name}":
            value = following
    return value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise LaunchError(f"{message[0].upper()}{message[1:]}: see {self.prog} --help.")


def make_parser(prog: str, described: str | None) -> argparse.ArgumentParser:
    """Make a parser whose errors are LaunchErrors; `described` is a module's docstring."""
    return _Parser(
        prog=prog,
        description=described,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def option(default: Any, described: str, least: int = 0) -> Any:
    """Declare a field of a dataclass of options, with its line in --help.

    Args:
      default: of the flag; `...`: the flag is required.
      described: its line in --help.
      least: the smallest value of a number.
    """
    metadata = {"help": described, "least": least}
    if default is ...:
        return dataclasses.field(metadata=metadata, kw_only=True)
    return dataclasses.field(default=default, metadata=metadata, kw_only=True)


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """Add a flag per field of a dataclass of options; the flag of a tuple may be repeated."""
    for field in dataclasses.fields(options):
        described = field.metadata["help"].replace("%", "%%")
        flag = f"--{field.name}"
        if field.type is bool:
            parser.add_argument(flag, action="store_true", help=described)
        elif field.default == ():
            parser.add_argument(flag, action="append", default=[], help=described)
        elif field.default is dataclasses.MISSING:
            parser.add_argument(flag, type=field.type, required=True, help=described)
        else:
            described += f" (default: {field.default!r})"
            parser.add_argument(flag, type=field.type, default=field.default, help=described)


def read_options(options: type[Options], given: argparse.Namespace) -> Options:
    """Make the dataclass of options from the parsed flags."""
    values = {}
    for field in dataclasses.fields(cast(Any, options)):
        value = values[field.name] = getattr(given, field.name)
        if isinstance(value, int | float) and value < field.metadata["least"]:
            raise LaunchError(
                f"--{field.name}={value} is too small: give {field.metadata['least']} or more."
            )
    return options(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})


def run_main(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a launcher's `main(arguments)` and exit; a UserError is printed as its sentence."""
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("Interrupted.  Jobs that were started keep running.", file=sys.stderr)
        code = 130
    sys.exit(code)
