"""python -m moe_jax doctor --config=configs/tiny.py: check a config on the devices at hand."""

import dataclasses
import functools
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
from etils import epath
from jax.experimental import multihost_utils

from moe_jax.cli.commands import COMMANDS, REGISTRATIONS
from moe_jax.cli.parse import parse
from moe_jax.config import from_config_dict
from moe_jax.errors import UserError
from moe_jax.files.workdir import Folder, locate
from moe_jax.parallel import distributed
from moe_jax.parallel.host_memory import keep_freed_memory
from moe_jax.parallel.platforms import check_platforms
from moe_jax.run import agree
from moe_jax.tools.doctor.checks import CHECKS
from moe_jax.tools.doctor.examine import examine, make_subject, report
from moe_jax.tools.doctor.finding import Finding
from moe_jax.tools.doctor.shrink import DEVICES
from moe_jax.tools.doctor.spread import SPREAD, load_spreads

_CONFORMANCE = ("conformance", "conformance=true", "conformance=True", "conformance=1")


def main(argv: Sequence[str]) -> int:
    """Print one line per check; return 1 if any check fails."""
    conformance = any(word.lstrip("-") in _CONFORMANCE for word in argv[1:])
    command = COMMANDS["doctor"]
    if conformance:
        flags = (REGISTRATIONS, *command.flags)
        command = dataclasses.replace(command, config=False, flags=flags)
    parsed = parse(argv, command)
    given = parsed.flags
    if given.steps < 0:
        raise UserError(f"--steps={given.steps}: give a number of steps such as 30, or 0 for none.")
    if given.steps and given.conformance:
        raise UserError("--steps trains a config: remove --steps or --conformance.")
    keep_freed_memory()
    # The comparison of meshes needs them, and so does the mesh that a shrunk config keeps.
    if not (given.conformance and given.devices):
        jax.config.update("jax_num_cpu_devices", max(DEVICES, given.devices))
    if given.conformance:
        check_platforms()
        from moe_jax.tools.doctor.conformance.run import main_conformance

        return main_conformance(given.full, _say)
    if given.full:
        raise UserError("--full needs --conformance: add --conformance, or remove --full.")
    distributed.start(given.coordinator, given.process_count, given.process_id)
    config = from_config_dict(parsed.config)
    agree.check_start(config, {"devices": given.devices, "steps": given.steps})
    if config.precision == "float64":
        jax.config.update("jax_enable_x64", True)
    check_platforms()
    checks = dict(CHECKS)
    if given.steps:
        checks[SPREAD] = functools.partial(load_spreads, steps=given.steps, say=_say)
    began = time.perf_counter()
    with _folder(given.workdir) as folder:
        try:
            subject = make_subject(config, given.devices, folder, _say)
        except UserError as error:  # no check can run with this config
            report(next(iter(CHECKS)), Finding(False, "0 checks can run", str(error)), _say)
            return 1
        failed = examine(subject, checks, _say)
    _say(f"{len(checks)} checks, {failed} failed, {time.perf_counter() - began:.0f} s")
    return 1 if failed else 0


@contextmanager
def _folder(workdir: str) -> Iterator[Folder]:
    """A temporary folder for the examined run, removed afterwards: in `workdir` if it is set."""
    if not workdir:
        if jax.process_count() > 1:
            raise UserError("--workdir is missing: set it to a folder that all processes share.")
        with tempfile.TemporaryDirectory(prefix="moe_doctor_") as folder:
            yield Path(folder) / "run"
        return
    scratch = epath.Path(locate(workdir)) / "doctor"
    _remove(scratch)  # a doctor that was killed leaves its folder behind
    try:
        yield scratch / "run"
    finally:
        _remove(scratch)


def _remove(folder: epath.Path) -> None:
    """Remove `folder` on the lead process while all others wait."""
    if distributed.lead() and folder.exists():
        folder.rmtree()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("doctor")


def _say(line: str) -> None:
    if distributed.lead():
        print(line, flush=True)
