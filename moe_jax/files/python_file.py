"""Runs a user's Python file (a config or a sweep) and turns its errors into UserErrors."""

import contextlib
import dis
import importlib.util
import inspect
import os
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from moe_jax.errors import UserError


def read_function(file: str, name: str, flag: str) -> Callable[..., Any]:
    """Run a Python file and look up one function that it defines.

    Args:
      file: path of the file.
      name: name of the function, such as `get_config`.
      flag: the flag that named the file, such as `--config=configs/tiny.py`; errors begin with it.

    Returns:
      The function.  Call it inside `blame(file, flag)`.

    Raises:
      UserError: no such file, no such function, or the file raises or exits.
    """
    if not os.path.isfile(file):
        if os.path.isdir(file):
            raise UserError(f"{flag}: {file!r} is a folder: name a Python file.")
        raise UserError(f"{flag}: there is no file {file!r}.")
    spec = importlib.util.spec_from_file_location(f"moe_jax_{name}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"{flag}: the name of {file!r} must end in .py.")
    module = importlib.util.module_from_spec(spec)
    with blame(file, flag):
        spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{flag}: {file!r} defines no {name}().")
    return function


@contextlib.contextmanager
def blame(file: str, flag: str) -> Iterator[None]:
    """Turn any exception from the code of `file` into a UserError that begins with `flag`.

    SystemExit is an error too: the command has not done its work, so the file must not choose its
    exit code.

    Raises:
      UserError: the code raised; the message names the exception and the last line of `file` run.
    """
    try:
        yield
    except (KeyboardInterrupt, UserError):
        raise
    except SystemExit as error:
        raise UserError(
            f"{flag}: {_line(file, error)} exits with {error.code!r}: return instead, or raise an "
            f"error."
        ) from None
    except BaseException as error:
        text = _text(error)
        what = f"{type(error).__name__}: {text}" if text else type(error).__name__
        raise UserError(f"{flag}: {_line(file, error)} raises {what}.") from None


def reads_argument(function: Callable[..., Any]) -> bool:
    """False if `function` never reads its first parameter; True if it does or may."""
    if not inspect.isfunction(function) or hasattr(function, "__wrapped__"):
        return True
    name = next(iter(inspect.signature(function).parameters), "")
    code = function.__code__
    if {"locals", "vars"} & set(code.co_names):
        return True
    for instruction in dis.get_instructions(code):
        value = instruction.argval  # a tuple if one instruction loads two variables
        if "LOAD" in instruction.opname and name in (value if type(value) is tuple else (value,)):
            return True
    return False


def _text(error: BaseException) -> str:
    """The text of an exception on one line; ml_collections nests exceptions in their args."""
    inner = error.args[0] if len(error.args) == 1 else None
    while isinstance(inner, BaseException) and len(inner.args) == 1:
        inner = inner.args[0]
    return " ".join((inner if isinstance(inner, str) else str(error)).split()).rstrip(".")


def _line(file: str, error: BaseException) -> str:
    """`line N`: the innermost line of `file` in the traceback; `the file` if there is none."""
    here = os.path.realpath(file)
    if isinstance(error, SyntaxError) and os.path.realpath(error.filename or "") == here:
        return f"line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if os.path.realpath(frame.filename) == here]
    return f"line {lines[-1]}" if lines else "the file"
