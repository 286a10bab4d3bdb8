"""Records what defines a run: resolved config, overrides, package versions and git revision."""

import importlib.metadata
import json
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from moe_jax.files import json_files, seals
from moe_jax.files.write_errors import cannot_write
from moe_jax.version import __version__

CONFIG_RECORD = "config.json"
DATA_RECORD = "data.json"
_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorstore",
    "grain",
    "ml_collections",
    "numpy",
)


def write_run_record(
    workdir: str,
    config_json: str,
    overrides: Mapping[str, Any],
    data_fingerprint: str,
    data: Mapping[str, Any] = {},
) -> None:
    """Create `workdir` and write config.json, overrides.json, data.json and versions.json.

    Process 0 calls this at every start that has steps to run; a resumed run replaces the files.
    The two that a restart reads, config.json and data.json, are sealed.

    Args:
      workdir: folder of the run.
      config_json: the resolved config as `moe_jax.config.to_json` writes it.
      overrides: the --config.* overrides of the command line.
      data_fingerprint: fingerprint of the token store.
      data: further fields of data.json.

    Raises:
      UserError: the folder cannot be written.
    """
    files = {
        CONFIG_RECORD: _sealed_text(json_files.parse(config_json)),
        "overrides.json": json.dumps(overrides, indent=2, sort_keys=True, default=str) + "\n",
        DATA_RECORD: _sealed_text({"fingerprint": data_fingerprint, **data}),
        "versions.json": json.dumps(versions(), indent=2, sort_keys=True) + "\n",
    }
    folder = epath.Path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            json_files.replace_text(folder / name, text)
    except OSError as error:
        advice = "choose another folder or change its permissions"
        raise cannot_write(f"--workdir={workdir}", error, advice) from None


def _sealed_text(value: Mapping[str, Any]) -> str:
    return json.dumps(seals.sealed(value), indent=2, sort_keys=True) + "\n"


def package_versions() -> dict[str, str | None]:
    """The versions of moe_jax and of its numerical dependencies; None: not installed."""
    packages: dict[str, str | None] = {"moe_jax": __version__}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    return packages


def versions() -> dict[str, Any]:
    """The versions of Python and packages, the devices, and the git revision of a checkout."""
    return {
        "python": platform.python_version(),
        "packages": package_versions(),
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "git": git_revision(),
    }


def git_revision() -> str | None:
    """The commit of the checkout that contains this package, `-dirty` if changed; None: no git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    folder = pathlib.Path(__file__).parent
    try:
        found = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
