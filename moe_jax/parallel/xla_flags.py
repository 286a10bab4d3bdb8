"""Sets XLA's flags, which XLA reads from the environment when a backend starts."""

import os


def add_xla_flag(name: str, value: str) -> None:
    """Set one flag unless the user has set it; call this before anything touches a device."""
    given = os.environ.get("XLA_FLAGS", "")
    if f"--{name}=" not in given:
        os.environ["XLA_FLAGS"] = f"{given} --{name}={value}".strip()


def avoid_command_buffers() -> None:
    """Launch kernels one by one, not as CUDA graphs; NVIDIA only.

    cuDNN captures a stream when it loads its attention kernel.  Work that another thread submits
    meanwhile ends the run ("capturing stream has unjoined work", jax 0.11.2).  The data feed's
    thread once moved batches to the device, and 4 of 12 runs ended so, with and without graphs.
    Since the consumer's thread moves them, none of 16 runs did (4 with graphs).  CUDA graphs
    capture far more and stay off: the step is as fast without them (bench_mixtral_2b, dropless: 144
    ms either way).
    """
    add_xla_flag("xla_gpu_enable_command_buffer", "")


def use_deterministic_kernels() -> None:
    """Forbid kernels without a fixed order of summation, and autotuning; NVIDIA only.

    XLA then uses the first kernel that fits an operation, the same one after a restart, so no
    autotuning result has to be stored.  ops/attention.py describes the effect on cuDNN's attention
    in models of several layers, and the workaround.
    """
    add_xla_flag("xla_gpu_deterministic_ops", "true")


def kernels_are_deterministic() -> bool:
    """True if XLA's flags forbid kernels whose results may differ from run to run."""
    names = "xla_gpu_deterministic_ops", "xla_gpu_exclude_nondeterministic_ops"
    given = os.environ.get("XLA_FLAGS", "").lower()
    return any(f"--{name}={value}" in given for name in names for value in ("true", "1"))


def use_virtual_devices(count: int) -> None:
    """Make the CPU appear as `count` devices; call this before anything touches a device."""
    import jax  # imported here because the command line is read before JAX is imported

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
