"""Settings and fixtures of all tests: 8 virtual CPU devices, checked signatures, compile cache."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import hypothesis
import jax
import jaxtyping
import pytest

ROOT = Path(__file__).resolve().parents[1]

# For this process and, as environment variables, for the processes that it starts.  By default the
# cache keeps only programs that took a second to compile, and hardly any jit of a test does.
JAX_SETTINGS = {
    "jax_platforms": "cpu",
    "jax_compilation_cache_dir": str(ROOT / ".cache" / "jax"),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    # Tests spend their time compiling: without LLVM's optimizations they take half the time.
    "jax_disable_most_optimizations": True,
}
for _name, _value in JAX_SETTINGS.items():
    jax.config.update(_name, _value)
# Only for this process: started ones have one device unless --devices says more.
jax.config.update("jax_num_cpu_devices", 8)
# XLA's older kernel emitters compile faster as well; newer versions no longer have them.
XLA_FLAGS = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}".strip()

# Examples have no time limit, because a busy machine must not fail a test.
hypothesis.settings.register_profile("moe_jax", deadline=None)
hypothesis.settings.load_profile("moe_jax")

# Before the first import of moe_jax: its signatures are then checked at each call.
jaxtyping.install_import_hook("moe_jax", "signatures.check")


# Collecting the tests only adds objects that stay.
gc.disable()


def pytest_collection_finish() -> None:
    """Exclude what collection made from garbage collection, and collect less often afterwards.

    JAX keeps the traces of all tests, and searching them took 40% of the CPU time of tests/moe.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    gc.enable()


class Finished(NamedTuple):
    """A process that has ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def cli_env() -> dict[str, str]:
    """Environment variables for started processes: ours, with CPU only and the same cache."""
    env = os.environ | {name.upper(): str(value) for name, value in JAX_SETTINGS.items()}
    env["XLA_FLAGS"] = XLA_FLAGS
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    return env


@pytest.fixture
def run_cli(cli_env: dict[str, str], tmp_path: Path) -> Callable[..., Finished]:
    """`run_cli(["moe_jax", "train", "--config=...", ...], timeout=...)` runs a new process.

    It runs in `tmp_path` unless `cwd` is given, so it writes nothing into the checkout.  After
    `timeout` seconds it is killed and subprocess.TimeoutExpired is raised.
    """

    def run(args: list[str], timeout: float = 300, cwd: Path | None = None) -> Finished:
        done = subprocess.run(
            [sys.executable, "-m", *args],
            cwd=cwd or tmp_path,
            env=cli_env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def pair(cli_env: dict[str, str]):
    """`pair(arguments)` starts two trainers of two devices each, connected to each other.

    `program` are Python's arguments for another program that reads the same flags; `each` holds
    the flags of one process only; other keywords are environment variables.  Both processes are
    killed when the test ends.
    """
    started: list[subprocess.Popen] = []

    def start(
        arguments: list[str],
        program: tuple[str, ...] = ("-m", "moe_jax", "train"),
        each: tuple[list[str], list[str]] = ([], []),
        **env: str,
    ) -> list[subprocess.Popen]:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        own = ["--devices=2", f"--coordinator=localhost:{port}", "--process_count=2"]
        for index in range(2):
            process = subprocess.Popen(
                [sys.executable, *program, *arguments, *own, *each[index], f"--process_id={index}"],
                env=cli_env | env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            started.append(process)
        return started[-2:]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def mesh_of() -> Callable[..., jax.sharding.Mesh]:
    """`mesh_of(data=2, expert=4)` makes a mesh of the first 8 virtual devices; other axes are 1."""
    from moe_jax.parallel.mesh import MeshConfig, make_mesh

    def make(data: int = 1, fsdp: int = 1, expert: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
        devices = jax.devices()[: data * fsdp * expert * tensor]
        return make_mesh(MeshConfig(data, fsdp, expert, tensor), devices)

    return make


@pytest.fixture
def x64():
    """Enable float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def golden() -> Callable[..., None]:
    """`golden("name", value)` asserts that value equals tests/golden/name.json, floats to `rtol`.

    Under MOE_JAX_WRITE_GOLDENS=1 a missing file is written and the test fails once, so that no
    golden is replaced by accident.
    """

    def compare(name: str, value: object, rtol: float = 0.0) -> None:
        path = ROOT / "tests" / "golden" / f"{name}.json"
        value = json.loads(json.dumps(value))
        if not path.exists():
            if os.environ.get("MOE_JAX_WRITE_GOLDENS") == "1":
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
            pytest.fail(f"{path} was missing: see Goldens in CONTRIBUTING.md")
        expected = json.loads(path.read_text())
        assert jax.tree.structure(value) == jax.tree.structure(expected)
        for (where, new), old in zip(
            jax.tree.leaves_with_path(value), jax.tree.leaves(expected), strict=True
        ):
            where = jax.tree_util.keystr(where)
            if isinstance(old, float):
                assert new == pytest.approx(old, rel=rtol, abs=0), where
            else:
                assert new == old, where

    return compare
