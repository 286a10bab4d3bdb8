"""`import moe_jax` costs nothing, and the names it offers are there."""

import subprocess
import sys

import pytest

import moe_jax


def test_importing_the_package_imports_no_jax(cli_env):
    """A launcher imports moe_jax.errors on machines that may hold no JAX."""
    code = "import sys, moe_jax; print(sorted({'jax', 'flax', 'numpy'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=cli_env, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_every_name_it_offers_is_there():
    names = moe_jax._EXPORTS
    assert {"load", "LoadedModel", "make_mesh"} <= set(names)
    for name, module in names.items():
        assert getattr(moe_jax, name).__module__ == module and name in dir(moe_jax)
    with pytest.raises(AttributeError, match="moe_jax' has no attribute 'lode'"):
        moe_jax.lode  # noqa: B018
