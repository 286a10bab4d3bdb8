"""Saves a compiled train step to a file, and loads it on the pod.

The file is the output of `jax.experimental.serialize_executable`, which contains a pickle and
machine code: loading it runs its content.  So `load_step` takes the SHA-256 that `save_step`
returned and refuses any other file.
"""

import hashlib
import os
from collections.abc import Sequence
from typing import Any

from jax.experimental import serialize_executable

from moe_jax.errors import UserError
from moe_jax.tools.plan.lowering import Plan, lower


def check_writable(path: str) -> None:
    """Raise UserError if the file cannot be written; called before minutes of compiling."""
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"--save={path} cannot be written: use a folder that is there.")


def save_step(executable: Any, path: str) -> str:
    """Write a compiled step; return the SHA-256 of the file."""
    payload, _, _ = serialize_executable.serialize(executable)
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as file:
            file.write(payload)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"--save={path} cannot be written: {error.strerror}.") from None
    return hashlib.sha256(payload).hexdigest()


def load_step(path: str, digest: str, plan: Plan, devices: Sequence[Any]) -> Any:
    """Load the compiled step of `plan`, which is called as (state, batch).

    Args:
      path: a file of `save_step`.
      digest: the SHA-256 that `save_step` returned.
      plan: of the same config and number of devices.
      devices: to run on, of the kind that the step was compiled for.

    Raises:
      UserError: the file cannot be read, or its SHA-256 is not `digest`.
    """
    try:
        with open(path, "rb") as file:
            payload = file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    found = hashlib.sha256(payload).hexdigest()
    if found != digest:
        raise UserError(
            f"{path} has SHA-256 {found}, not {digest}: it is not the saved file, and loading it "
            f"would run its content. Save the plan again."
        )
    lowered = lower(plan, devices)  # needed only for the structure of arguments and results
    return serialize_executable.deserialize_and_load(
        payload,
        lowered.in_tree,
        lowered.out_tree,
        backend=devices[0].client,
        execution_devices=devices,
    )
