"""Flags are added once to XLA's environment variable, and the user's own take precedence."""

import os

from moe_jax.parallel.xla_flags import (
    add_xla_flag,
    avoid_command_buffers,
    kernels_are_deterministic,
    use_deterministic_kernels,
)


def test_a_flag_joins_those_of_the_user(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    avoid_command_buffers()
    avoid_command_buffers()
    expected = "--xla_gpu_deterministic_ops=true --xla_gpu_enable_command_buffer="
    assert os.environ["XLA_FLAGS"] == expected


def test_what_the_user_set_stays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false")
    add_xla_flag("xla_gpu_deterministic_ops", "true")
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_deterministic_ops=false"


def test_deterministic_kernels(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    assert not kernels_are_deterministic()
    use_deterministic_kernels()
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_deterministic_ops=true"
    assert kernels_are_deterministic()
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false")
    assert not kernels_are_deterministic()
