"""XLA's flags, which it reads from the environment when a backend starts."""

import os


def add_xla_flag(name: str, value: str) -> None:
    """Set one flag for this process unless the user has; call before anything touches a device."""
    given = os.environ.get("XLA_FLAGS", "")
    if f"--{name}=" not in given:
        os.environ["XLA_FLAGS"] = f"{given} --{name}={value}".strip()


def avoid_command_buffers() -> None:
    """NVIDIA only: launch kernels one by one, not as CUDA graphs.

    With graphs, two of three runs of bench_mixtral_2b, dropless, ended at the first step: cuDNN
    failed to load its attention ("capturing stream has unjoined work", jax 0.11.2).  Without them
    none of three did, at the same speed.
    """
    add_xla_flag("xla_gpu_enable_command_buffer", "")
