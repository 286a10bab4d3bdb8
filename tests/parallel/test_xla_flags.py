"""Flags reach XLA's environment variable once, and the user's own come first."""

import os
import subprocess
import sys

import jax
import pytest

from moe_jax.parallel.xla_flags import (
    add_xla_flag,
    avoid_command_buffers,
    use_deterministic_kernels,
)

# What XLA would compile with, in a process of its own: it reads its flags once.
SHOW = """
import pathlib, sys
import jax
from jax._src import compiler
from moe_jax.parallel.xla_flags import use_deterministic_kernels

use_deterministic_kernels(pathlib.Path(sys.argv[1]))
options = compiler.get_compile_options(num_replicas=1, num_partitions=1)
print(options.executable_build_options.debug_options.xla_gpu_per_fusion_autotune_cache_dir)
"""


@pytest.fixture
def own_flags(monkeypatch):
    """No flags yet; JAX's setting comes back afterwards."""
    monkeypatch.setenv("XLA_FLAGS", "")
    before = jax.config.jax_persistent_cache_enable_xla_caches
    yield
    jax.config.update("jax_persistent_cache_enable_xla_caches", before)


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


def test_deterministic_kernels_are_kept_in_the_workdir(own_flags, tmp_path):
    for _ in range(2):  # a second process of the run finds the folder there
        use_deterministic_kernels(tmp_path)
    [folder] = (tmp_path / "autotune").iterdir()
    assert folder.is_dir() and folder.name.startswith("jaxlib-0.")
    assert os.environ["XLA_FLAGS"] == (
        f"--xla_gpu_deterministic_ops=true --xla_gpu_per_fusion_autotune_cache_dir={folder}"
    )


def test_nothing_is_kept_in_an_object_store(own_flags):
    use_deterministic_kernels(None)
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_deterministic_ops=true"


def test_xla_reads_the_folder(cli_env, tmp_path):
    """Through a name with a blank, and though JAX has a place of its own beside its cache."""
    workdir = tmp_path / "my run"
    done = subprocess.run(
        [sys.executable, "-c", SHOW, str(workdir)], env=cli_env, capture_output=True, text=True
    )
    [folder] = (workdir / "autotune").iterdir()
    assert done.stdout.strip() == str(folder), done.stderr
