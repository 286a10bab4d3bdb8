"""A compiled train step in a file: made here, run on the pod.

The file is what `jax.experimental.serialize_executable` gives, which is a pickle inside and machine
code in any case: loading one is running a program.  So `load_step` asks for the SHA-256 that
`save_step` printed and refuses any other file.
"""

import hashlib
import os
from collections.abc import Sequence
from typing import Any

from jax.experimental import serialize_executable

from moe_jax.errors import UserError
from moe_jax.tools.plan.lowering import Plan, lower


def check_writable(path: str) -> None:
    """Raises UserError where no file can be made: before minutes of compiling, not after."""
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"--save={path} cannot be written: name a file in a folder that is there.")


def save_step(executable: Any, path: str) -> str:
    """Writes a compiled step; returns the SHA-256 of the file."""
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
    """The compiled step of `plan`, ready to be called as (state, batch).

    Args:
      path: a file of `save_step`.
      digest: the SHA-256 that was printed when it was written.
      plan: of the same config and number of devices.
      devices: to run on, of the kind it was compiled for.

    Raises:
      UserError: the file cannot be read, or is another one than was written.
    """
    try:
        with open(path, "rb") as file:
            payload = file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    found = hashlib.sha256(payload).hexdigest()
    if found != digest:
        raise UserError(
            f"{path} has SHA-256 {found}, not {digest}: it is not the file that was saved, and "
            f"loading it would run whatever is in it."
        )
    lowered = lower(plan, devices)  # traced only for the structure of what goes in and out
    return serialize_executable.deserialize_and_load(
        payload,
        lowered.in_tree,
        lowered.out_tree,
        backend=devices[0].client,
        execution_devices=devices,
    )
