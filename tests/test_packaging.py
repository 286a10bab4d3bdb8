"""The wheel contains only moe_jax, and its console commands work outside the checkout."""

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def console_commands() -> dict[str, EntryPoint]:
    """Name -> entry point, from setup.cfg."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options.entry_points"]["console_scripts"].strip().splitlines()
    pairs = [[part.strip() for part in line.split("=", 1)] for line in lines]
    return {name: EntryPoint(name, value, "console_scripts") for name, value in pairs}


@pytest.fixture(scope="module")
def source_copy(tmp_path_factory) -> Path:
    """A copy of the tracked files, because builds leave stale files next to the sources."""
    copy = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("moe_jax", "configs", "launch", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(source_copy: Path, tmp_path_factory) -> Path:
    """A wheel of the copy, built without network by this environment's setuptools."""
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*build, "--wheel-dir", str(out), str(source_copy)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_every_module_of_moe_jax_and_nothing_else(wheel: Path):
    inside = zipfile.ZipFile(wheel).namelist()
    code = {name for name in inside if ".dist-info/" not in name}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "moe_jax").rglob("*.py")}
    assert code == expected | {"moe_jax/py.typed"}


def test_wheel_carries_its_licence_and_commands(wheel: Path):
    archive = zipfile.ZipFile(wheel)
    meta = {
        name.split(".dist-info/", 1)[1]: name for name in archive.namelist() if "-info/" in name
    }
    assert "licenses/LICENSE" in meta
    declared = archive.read(meta["entry_points.txt"]).decode()
    for name, entry in console_commands().items():
        assert f"{name} = {entry.value}" in declared


@pytest.mark.parametrize("name", console_commands())
def test_console_command_is_callable(name: str):
    assert callable(console_commands()[name].load())


@pytest.mark.parametrize("name", console_commands())
def test_console_command_answers_help(name: str, cli_env, tmp_path):
    """Does what the script in bin/ does: import, call, exit.  Its name selects the command."""
    entry = console_commands()[name]
    script = tmp_path / name
    script.write_text(
        f"import sys; from {entry.module} import {entry.attr}; sys.exit({entry.attr}())"
    )
    command = [sys.executable, str(script), "--help"]
    done = subprocess.run(command, env=cli_env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"moe_jax {name.removeprefix('moe-')} " in done.stdout and not done.stderr


def test_help_and_import_come_without_jax():
    """JAX and Flax cannot be imported in the process: --help must not spend seconds on them."""
    program = (
        "import sys; sys.modules['jax'] = sys.modules['flax'] = None\n"
        "import moe_jax; moe_jax.UserError\n"
        "from moe_jax.cli.commands import COMMANDS, help_text, overview\n"
        "print(overview(), *(help_text(*item) for item in COMMANDS.items()))\n"
        "print(sorted(name for name in sys.modules if name.startswith(('jax', 'flax'))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['flax', 'jax']"


@pytest.mark.full
def test_install_into_an_empty_environment(source_copy: Path, tmp_path: Path):
    """`pip install .` installs everything that each command needs, without the checkout."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    bin_dir = tmp_path / "venv" / "bin"
    install = subprocess.run(
        [
            str(bin_dir / "python"),
            "-m",
            "pip",
            "install",
            "--progress-bar",
            "off",
            str(source_copy),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert install.returncode == 0, install.stdout[-2000:] + install.stderr[-2000:]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for name in console_commands():
        done = subprocess.run(
            [str(bin_dir / name), "--help"],
            cwd=elsewhere,
            env={**env, "JAX_PLATFORMS": "cpu"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{name}: {done.stderr}"
    assert list(elsewhere.iterdir()) == []
