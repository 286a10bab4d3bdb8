"""Checks that the requested JAX platform starts, and lists the ones that do."""

import glob

import jax

from moe_jax.errors import UserError

_TPU_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")


def check_platforms() -> None:
    """Start JAX's backends; call this after `distributed.start`.

    Raises:
      UserError: a requested platform is not installed, or does not start.
    """
    asked = jax.config.jax_platforms
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: a plugin is not installed
        there = ", ".join(_available()) or "none"
        what = f"JAX_PLATFORMS={asked}" if asked else "JAX"
        lines = str(error).strip().splitlines()
        why = lines[0].partition(" (set JAX_PLATFORMS")[0] if lines else "no plugin for it"
        raise UserError(
            f"{what} cannot be started ({why}); platforms of this machine: {there}: set "
            f"JAX_PLATFORMS to one of them, or install the missing plugin (extras cuda and tpu)."
        ) from None


def _available() -> list[str]:
    """The platforms that start, each tried alone; for a process that is about to end."""
    names = ["cpu", "cuda", "rocm"]
    # Without chips, starting libtpu logs errors for seconds.
    if any(glob.glob(pattern) for pattern in _TPU_DEVICES):
        names.append("tpu")
    return [name for name in names if _starts(name)]


def _starts(name: str) -> bool:
    jax.config.update("jax_platforms", name)
    try:
        return bool(jax.devices(name))
    except (RuntimeError, AssertionError):
        return False
