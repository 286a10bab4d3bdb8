"""`import moe_jax` exports each of its names, and imports a module only when a name is used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moe_jax

ROOT = Path(__file__).resolve().parents[1]


def test_importing_the_package_imports_no_jax(cli_env):
    """A launcher imports moe_jax.errors on machines that may not have JAX."""
    code = (
        "import sys, moe_jax, moe_jax.data\n"
        "print(sorted({'jax', 'flax', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=cli_env, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("space", [moe_jax, moe_jax.data, moe_jax.ops])
def test_every_name_it_offers_is_there(space):
    for name in space.__all__:
        assert getattr(space, name) is not None and name in dir(space)
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        space.lode  # noqa: B018


@pytest.mark.parametrize("file", ["moe_jax/__init__.py", "moe_jax/data/__init__.py"])
def test_type_checkers_see_the_names_that_are_looked_up(file):
    tree = ast.parse((ROOT / file).read_text())
    space = sys.modules[file.removesuffix("/__init__.py").replace("/", ".")]
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name for node in block.body for alias in node.names}
    assert seen == set(space.__all__) - {"UserError", "__version__"}
