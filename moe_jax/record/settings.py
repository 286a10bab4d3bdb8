"""Records the settings under which each step ran: resolved config, devices, processes, versions.

WORKDIR/settings.jsonl has one line per change of any of them.  `tools/replay.py` reads it, because
other devices or another mesh change the rounding of a step, and another `train.steps` changes the
step itself.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from moe_jax.config import Config, config_of_record, to_dict
from moe_jax.errors import UserError
from moe_jax.files import json_files, records, seals
from moe_jax.files.workdir import Folder
from moe_jax.files.write_errors import cannot_write
from moe_jax.record.provenance import versions

SETTINGS = "settings.jsonl"
MAX_PROCESSES = 2**20  # maximum number of devices, and of processes


@dataclasses.dataclass(frozen=True)
class Settings:
    """One line of the file."""

    after: int  # the step that the run started or resumed from; the settings hold for later steps
    config: dict[str, Any]  # resolved, as `moe_jax.config.to_dict` gives it
    platform: str
    devices: int
    processes: int
    xla_flags: str
    versions: dict[str, Any]  # as in versions.json

    def typed(self) -> Config:
        """The config as a Config; raises UserError as `config_of_record`."""
        return config_of_record(self.config, SETTINGS)


def record_settings(workdir: Folder, config: Config, mesh: Mesh, step: int) -> None:
    """Record the settings of the steps after `step`, if they have changed.

    Process 0 calls this when a run starts or resumes, before the first step.

    Args:
      workdir: folder of the run.
      config: the resolved config.
      mesh: the mesh of the run.
      step: the step that the run starts or resumes from.

    Raises:
      UserError: the file cannot be written, or is damaged.
    """
    now = Settings(
        after=step,
        config=to_dict(config),
        platform=mesh.devices.flat[0].platform,
        devices=mesh.size,
        processes=jax.process_count(),
        xla_flags=os.environ.get("XLA_FLAGS", ""),
        versions=versions(),
    )
    before = read_settings(workdir)
    if not before or dataclasses.replace(before[-1], after=step) != now or before[-1].after > step:
        _write(workdir, (*before, now))


def settings_go_back(workdir: Folder, step: int) -> None:
    """Record that the current attempt repeats the steps after `step` under its own settings."""
    before = read_settings(workdir)
    if before and before[-1].after > step:
        _write(workdir, (*before, dataclasses.replace(before[-1], after=step)))


def settings_at(history: Sequence[Settings], step: int) -> Settings:
    """Return the settings in force when `step` (1-based) last ran.

    Raises:
      UserError: the step ran under an older version, which did not record its settings.
    """
    for settings in reversed(history):
        if settings.after < step:
            return settings
    raise UserError(
        f"{SETTINGS} does not record the devices and config under which step {step} ran: choose a "
        f"later step."
    )


def read_settings(workdir: Folder) -> tuple[Settings, ...]:
    """The lines of a workdir's file; empty if there is no file.

    Raises:
      UserError: the file cannot be read, or is damaged.
    """
    path = workdir / SETTINGS
    try:
        return tuple(records.parse_lines(json_files.read_lines(path), _settings))
    except FileNotFoundError:
        return ()
    except records.LineError as damaged:
        raise UserError(
            f"{path} is damaged in line {damaged.number}: restore it, or move it away (the steps "
            f"until now can then not be replayed)."
        ) from None


def _settings(value: Any) -> Settings:
    """Build a record; raises ValueError for one that no run wrote."""
    settings = records.typed(Settings, seals.unsealed(value))
    if not (0 < settings.devices <= MAX_PROCESSES and 0 < settings.processes <= MAX_PROCESSES):
        raise ValueError("its number of devices or processes is out of range")
    return settings


def _write(workdir: Folder, history: Sequence[Settings]) -> None:
    lines = (seals.sealed(dataclasses.asdict(one)) for one in history)
    text = "".join(f"{json.dumps(line, sort_keys=True)}\n" for line in lines)
    try:
        json_files.replace_text(workdir / SETTINGS, text)
    except OSError as error:
        raise cannot_write(workdir / SETTINGS, error, "change its permissions") from None
