"""With what the steps of a run were taken: its resolved config, devices, processes, versions.

WORKDIR/settings.jsonl has a line for each time any of it changed.  `tools/replay.py` reads it:
other devices, another mesh, or another `train.steps` make the same step round otherwise, or another
step.
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
MOST = 2**20  # devices, or processes


@dataclasses.dataclass(frozen=True)
class Settings:
    """One line of the file."""

    after: int  # the step that the run went on from; those after it were taken so
    config: dict[str, Any]  # resolved, as `moe_jax.config.to_dict` gives it
    platform: str
    devices: int
    processes: int
    xla_flags: str
    versions: dict[str, Any]  # as in versions.json

    def typed(self) -> Config:
        """Its config; raises UserError as `config_of_record`."""
        return config_of_record(self.config, SETTINGS)


def record_settings(workdir: Folder, config: Config, mesh: Mesh, step: int) -> None:
    """Writes down with what the steps after `step` are taken, if that has changed.

    Process 0 calls it when a run begins or goes on, before the first step.

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
    """The process that wrote the last line takes the steps after `step` again."""
    before = read_settings(workdir)
    if before and before[-1].after > step:
        _write(workdir, (*before, dataclasses.replace(before[-1], after=step)))


def settings_of(history: Sequence[Settings], step: int) -> Settings:
    """With what `step`, counted from 1, was taken: when it was taken last, if that was often.

    Raises:
      UserError: an older version took it, which wrote nothing down.
    """
    for settings in reversed(history):
        if settings.after < step:
            return settings
    raise UserError(
        f"{SETTINGS} does not say with what devices and config step {step} was taken: ask for a "
        f"later step."
    )


def read_settings(workdir: Folder) -> tuple[Settings, ...]:
    """The lines of a workdir's file; none where there is no file.

    Raises:
      UserError: it cannot be read, or is damaged.
    """
    path = workdir / SETTINGS
    try:
        return tuple(records.parse_lines(json_files.read_lines(path), _settings))
    except FileNotFoundError:
        return ()
    except records.LineError as damaged:
        raise UserError(
            f"{path} is damaged in line {damaged.number}: bring it back, or move it away (the "
            f"steps until now can then not be replayed)."
        ) from None


def _settings(value: Any) -> Settings:
    """Raises ValueError for a record that no run wrote."""
    settings = records.typed(Settings, seals.unsealed(value))
    if not (0 < settings.devices <= MOST and 0 < settings.processes <= MOST):
        raise ValueError("it has no such number of devices or processes")
    return settings


def _write(workdir: Folder, history: Sequence[Settings]) -> None:
    lines = (seals.sealed(dataclasses.asdict(one)) for one in history)
    text = "".join(f"{json.dumps(line, sort_keys=True)}\n" for line in lines)
    try:
        json_files.replace_text(workdir / SETTINGS, text)
    except OSError as error:
        raise cannot_write(workdir / SETTINGS, error, "change its permissions") from None
