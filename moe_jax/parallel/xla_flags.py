"""XLA's flags, which it reads from the environment when a backend starts."""

import os


def add_xla_flag(name: str, value: str) -> None:
    """Set one flag for this process unless the user has; call before anything touches a device."""
    given = os.environ.get("XLA_FLAGS", "")
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


def use_deterministic_kernels() -> None:
    """NVIDIA only: no kernel that adds in no fixed order, and none chosen by measuring.

    XLA then takes the first kernel that fits an operation, the same one after a restart, so there
    is no choice to keep.  What this does to cuDNN's attention in models of several layers, and the
    way round it, stands in ops/attention.py.
    """
    add_xla_flag("xla_gpu_deterministic_ops", "true")


def kernels_are_deterministic() -> bool:
    """Whether XLA has been told to use no kernel that may differ from run to run."""
    names = "xla_gpu_deterministic_ops", "xla_gpu_exclude_nondeterministic_ops"
    given = os.environ.get("XLA_FLAGS", "").lower()
    return any(f"--{name}={value}" in given for name in names for value in ("true", "1"))


def use_virtual_devices(count: int) -> None:
    """The CPU, as `count` devices; call it before anything touches a device."""
    import jax  # here: the command line is read before JAX is imported

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
