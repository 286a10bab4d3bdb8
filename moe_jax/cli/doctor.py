"""python -m moe_jax doctor --config=configs/tiny.py: check a config on the devices at hand."""

import dataclasses
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
    agree.check_start(config, {"devices": given.devices})
    if config.precision == "float64":
        jax.config.update("jax_enable_x64", True)
    check_platforms()
    began = time.perf_counter()
    with _folder(given.workdir) as folder:
        try:
            subject = make_subject(config, given.devices, folder, _say)
        except UserError as error:  # no check can run with this config
            report(next(iter(CHECKS)), Finding(False, "0 checks can run", str(error)), _say)
            return 1
        failed = examine(subject, CHECKS, _say)
    _say(f"{len(CHECKS)} checks, {failed} failed, {time.perf_counter() - began:.0f} s")
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
