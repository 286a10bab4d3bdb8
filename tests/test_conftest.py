"""The settings and fixtures of conftest.py do what they promise to the other tests."""

import importlib
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

CHECKED_MODULE = """
import dataclasses
import jax
from jaxtyping import Array, Float

def total(x_BD: Float[Array, "B D"]) -> Float[Array, "B"]:
    return x_BD.sum(axis=0)

@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    x_D: Float[Array, "D"]
"""


@pytest.fixture
def checked_module(tmp_path, monkeypatch):
    """A module imported under the same checker as moe_jax."""
    (tmp_path / "checked_module.py").write_text(CHECKED_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    with jaxtyping.install_import_hook("checked_module", "signatures.check"):
        yield importlib.import_module("checked_module")
    del sys.modules["checked_module"]


def test_eight_cpu_devices():
    assert [device.platform for device in jax.devices()] == ["cpu"] * 8


def test_mesh_of_takes_only_the_devices_it_needs(mesh_of):
    assert dict(mesh_of(data=2, expert=4).shape) == {"data": 2, "fsdp": 1, "expert": 4, "tensor": 1}
    assert mesh_of(fsdp=2).size == 2


def test_x64_is_float64_inside(x64):
    assert jnp.zeros(()).dtype == jnp.float64


def test_outside_x64_is_float32():
    assert jnp.zeros(()).dtype == jnp.float32


def test_signatures_are_checked(checked_module):
    with pytest.raises(jaxtyping.TypeCheckError):
        checked_module.total(jnp.zeros((2, 3)))


def test_a_registered_dataclass_may_hold_what_jax_puts_in_it(checked_module):
    state = checked_module.State(jnp.zeros(3))
    assert jax.tree.map(jnp.shape, state).x_D == (3,)


def test_the_hook_covers_moe_jax():
    from moe_jax.parallel import rules

    assert hasattr(rules.spec, "__wrapped__"), "moe_jax was imported before the hook"


def test_run_cli_gives_code_output_and_errors(run_cli):
    done = run_cli(["timeit", "--help"])
    assert (done.code, done.err) == (0, "") and "timeit" in done.out
    assert run_cli(["no_such_module"]).code == 1


def test_a_started_process_has_one_device_and_the_cache(run_cli, tmp_path):
    (tmp_path / "probe.py").write_text(
        "import jax; print(jax.device_count(), jax.default_backend(),"
        " jax.config.jax_compilation_cache_dir)"
    )
    done = run_cli(["probe"])
    assert done.out.split() == ["1", "cpu", jax.config.jax_compilation_cache_dir], done.err


def test_golden_compares_and_refuses_what_moved(golden, monkeypatch, tmp_path):
    monkeypatch.setitem(golden.__globals__, "ROOT", tmp_path)
    monkeypatch.setenv("MOE_JAX_WRITE_GOLDENS", "1")
    value = {"losses": [1.0, 2.0], "name": "tiny", "none": None}
    with pytest.raises(pytest.fail.Exception, match="was missing"):
        golden("tiny", value)
    golden("tiny", value)
    golden("tiny", value | {"losses": [1.0, 2.0 + 1e-9]}, rtol=1e-6)
    for moved in ({"losses": [1.0, 2.1]}, {"losses": [1.0]}, {"name": "tiny2"}, {"none": 0}):
        with pytest.raises(AssertionError):
            golden("tiny", value | moved, rtol=1e-6)
