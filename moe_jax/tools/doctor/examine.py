"""Chooses the run that is checked for a config, and runs every check on it."""

import dataclasses
import textwrap
from collections.abc import Callable, Mapping

import jax

from moe_jax.config import Config
from moe_jax.errors import UserError
from moe_jax.files.workdir import Folder
from moe_jax.run.setup import prepare
from moe_jax.tools.doctor.finding import Finding
from moe_jax.tools.doctor.shrink import (
    TEXT,
    changes,
    limit_text,
    named_devices,
    shrink,
    shrink_mesh,
    without_warmup,
)
from moe_jax.tools.doctor.subject import Subject
from moe_jax.tools.plan.lowering import make_plan

Say = Callable[[str], None]
Checks = Mapping[str, Callable[[Subject], Finding]]


def make_subject(config: Config, num_devices: int, folder: Folder, say: Say) -> Subject:
    """Prepare the config itself on accelerators, or a shrunk one on CPUs, and say what shrank.

    Args:
      config: as the user wrote it.
      num_devices: number of virtual devices; 0: the real devices.
      folder: for checkpoints; tokenised text is stored next to it.
      say: called with lines for the report.

    Raises:
      UserError: the config does not fit the devices, or its data cannot be read.
    """
    devices = jax.devices()
    shrunk = jax.default_backend() == "cpu"
    if shrunk:
        mesh = config.mesh if num_devices else shrink_mesh(config.mesh)
        plan = make_plan(config, num_devices or named_devices(config.mesh))
        devices = devices[: num_devices or named_devices(mesh)]
        small = shrink(config, mesh.resolve(len(devices)))
        many = "1 CPU device" if len(devices) == 1 else f"{len(devices)} virtual CPU devices"
        say(f"no accelerator: a shrunk config runs on {many}")
        _say_changes(config, small, say)
    else:
        plan = make_plan(config, len(devices))
        data = limit_text(config.data, TEXT)
        small = dataclasses.replace(config, data=data)
        say(f"the config itself on {len(devices)} x {devices[0].device_kind}")
        if data != config.data:
            say("the config's own data is missing or too large to tokenise here")
            _say_changes(config, small, say)
    run = prepare(without_warmup(small), folder, lambda line: None, devices)
    return Subject(plan, run, shrunk, devices)


def _say_changes(old: Config, new: Config, say: Say) -> None:
    text = ", ".join(changes(old, new)) or "nothing had to shrink"
    for line in textwrap.wrap(text, 96, break_long_words=False, break_on_hyphens=False):
        say(f"    {line}")


def examine(subject: Subject, checks: Checks, say: Say) -> int:
    """Run every check, also after a failure; return the number of failed checks."""
    failed = 0
    for name, check in checks.items():
        finding = attempt(check, subject)
        failed += not finding.ok
        report(name, finding, say)
    return failed


def attempt(check: Callable[[Subject], Finding], subject: Subject) -> Finding:
    """Run a check; an exception in it is a failure of this check only."""
    try:
        return check(subject)
    except UserError as error:
        return Finding(False, "not measured: the config was rejected", str(error))
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return Finding(False, "not measured: the check raised an error", f"Fix the cause of {what}")


def report(name: str, finding: Finding, say: Say) -> None:
    """Print one line, the details, and the advice after a failure or a warning."""
    advises = finding.warns or not finding.ok
    mark = "FAIL" if not finding.ok else "warn" if finding.warns else "ok  "
    say(f"{mark}  {name:<34}{finding.figure}")
    for line in (*finding.details, *([finding.fix] if advises else [])):
        say(f"      {line}")
