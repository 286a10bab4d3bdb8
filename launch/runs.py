"""Turns a sweep file into named runs and their command lines."""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from launch import hyper
from launch.job import Job
from launch.shell import LaunchError
from moe_jax.errors import UserError
from moe_jax.files.python_file import blame, read_function

Run = Mapping[str, Any]

SLUG_LENGTH = 48  # 57 characters with the hash; clusters allow 63
_PLAIN = (str, int, float, bool)


def expand(path: str) -> dict[str, Run]:
    """Read a sweep file's runs, in order: name -> {"config": FILE[:ARG], "config.a.b": value}.

    Raises:
      LaunchError: the file has no get_hyper, get_hyper raises or exits, or a run has keys or values
        that cannot be flags of the trainer.
    """
    file, flag = os.path.expanduser(path), f"--sweep={path}"
    try:
        get_hyper = read_function(file, "get_hyper", flag)
        with blame(file, flag):
            runs = get_hyper(hyper)
    except LaunchError:  # from hyper.py: its sentence is already complete
        raise
    except UserError as error:
        raise LaunchError(str(error)) from None
    if not isinstance(runs, list):
        raise LaunchError(f"{path}: get_hyper() returns {type(runs).__name__}, not a list of runs.")
    named: dict[str, Run] = {}
    for number, run in enumerate(runs):
        _check(run, f"{path}: run {number}")
        name = run_name(run)
        if name in named:
            raise LaunchError(
                f"{path}: run {number} is the same as run {list(named).index(name)}: vary a key, "
                f"such as config.seed."
            )
        named[name] = dict(run)
    if not named:
        raise LaunchError(f"{path}: get_hyper() returns no runs.")
    return named


def run_name(run: Run) -> str:
    """Name a run: a readable part and a hash of all overrides.

    An example is tiny-cf-1-25-router-switch-0f3a9c21.  The name depends only on the overrides,
    consists of [a-z0-9-] and starts with a letter, because it also names the run's folder and its
    job.  Keys of several words are shortened to their initials.
    """
    config = os.path.splitext(os.path.basename(run["config"].partition(":")[0]))[0]
    words = [config, run["config"].partition(":")[2]]
    words += [f"{_short(key)}-{run[key]}" for key in sorted(run) if key != "config"]
    slug = re.sub("[^a-z0-9]+", "-", " ".join(words).lower())[:SLUG_LENGTH].strip("-")
    if not slug[:1].isalpha():
        slug = f"run-{slug}"
    canonical = json.dumps(run, sort_keys=True, separators=(",", ":"))
    return f"{slug}-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"


def job(name: str, run: Run, workdir: str, more: tuple[str, ...] = ()) -> Job:
    """Make the job of a run, with the workdir WORKDIR/name; `more` are flags that runs share."""
    overrides = (f"--{key}={_text(run[key])}" for key in sorted(run))
    return Job(name, (*overrides, f"--workdir={workdir.rstrip('/')}/{name}", *more))


def _check(run: Any, where: str) -> None:
    if not isinstance(run, Mapping):
        raise LaunchError(f"{where} is {run!r}: get_hyper() returns a list of dicts.")
    if not isinstance(run.get("config"), str):
        raise LaunchError(f"{where} names no config: add hyper.fixed('config', 'configs/tiny.py').")
    for key, value in run.items():
        if key != "config" and not (isinstance(key, str) and key.startswith("config.")):
            raise LaunchError(f"{where} sets {key!r}: use 'config', or 'config.' and a config key.")
        if type(value) is int and abs(value) >> 63:  # Python refuses to print very long integers
            raise LaunchError(
                f"{where} sets {key} to a number of over 63 bits: give a smaller one."
            )
        if type(value) not in _PLAIN or (isinstance(value, float) and not math.isfinite(value)):
            raise LaunchError(
                f"{where} sets {key} to {value!r} ({type(value).__name__}): use a string, a bool "
                f"or a finite int or float."
            )
        if "\0" in f"{key}{value}":
            raise LaunchError(f"{where} sets {key!r} to {value!r}: leave out the null character.")


def _short(key: str) -> str:
    """Shorten a key: config.model.moe.capacity_factor -> cf, config.train.steps -> steps."""
    name = key.rpartition(".")[2]
    return "".join(word[:1] for word in name.split("_")) if "_" in name else name


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
