"""XLA's flags, which it reads from the environment when a backend starts."""

import importlib.metadata
import os
import pathlib

import jax


def add_xla_flag(name: str, value: str) -> None:
    """Set one flag for this process unless the user has; call before anything touches a device."""
    given = os.environ.get("XLA_FLAGS", "")
    value = f'"{value}"' if any(map(str.isspace, value)) else value
    if f"--{name}=" not in given:
        os.environ["XLA_FLAGS"] = f"{given} --{name}={value}".strip()


def avoid_command_buffers() -> None:
    """NVIDIA only: launch kernels one by one, not as CUDA graphs.

    cuDNN captures a stream when it loads its attention, and work of another thread meanwhile ends
    the run ("capturing stream has unjoined work", jax 0.11.2): so it was in four of twelve runs
    while the data feed's thread moved batches to the device, with graphs and without, and in none
    of sixteen since the consumer's thread does that, four of them with graphs.  Graphs, which
    capture far more, stay off: the step is as fast without them (bench_mixtral_2b, dropless: 144
    ms either way).
    """
    add_xla_flag("xla_gpu_enable_command_buffer", "")


def use_deterministic_kernels(workdir: pathlib.Path | None) -> None:
    """NVIDIA only: the same bits every time, after a restart as well; makes WORKDIR/autotune.

    `xla_gpu_deterministic_ops` leaves out kernels that add in no fixed order, and has XLA take the
    first kernel that fits an operation instead of the one that was fastest this time.  What it
    took is kept, so that a restart takes it again also where the user lets XLA measure
    (XLA_FLAGS=--xla_gpu_deterministic_ops=false).

    XLA keeps a file for each operation, named by a hash of device and operation.  It reads before
    it chooses; operations of a changed config are added.  Files are written aside and renamed, so
    that several processes can share the folder.  They mean something to one version of XLA only.

    Args:
      workdir: of the run; None where XLA cannot write, in an object store: nothing is kept there.
    """
    add_xla_flag("xla_gpu_deterministic_ops", "true")
    if workdir is None:
        return
    folder = workdir / "autotune" / f"jaxlib-{importlib.metadata.version('jaxlib')}"
    folder.mkdir(parents=True, exist_ok=True)
    add_xla_flag("xla_gpu_per_fusion_autotune_cache_dir", os.fspath(folder))
    # With a persistent compile cache JAX would put the folder there.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "")
