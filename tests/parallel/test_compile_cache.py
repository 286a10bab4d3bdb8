"""The folder of compiled programs: damaged entries are removed, the others are loaded."""

import hashlib
import json
import os
import subprocess
import sys
import zlib

import filelock
import jax
import pytest
import zstandard
from jax.experimental.compilation_cache import compilation_cache

from moe_jax.errors import UserError
from moe_jax.parallel import compile_cache
from moe_jax.parallel.compile_cache import CompileCacheConfig, default_folder, kept_programs

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)
WHOLE = zlib.compress(b"time" + bytes(range(256)) * 40)
# A process that runs one program and prints how many it compiled and how many it read.
PROGRAM = """
import collections, os, signal, sys
import jax
from etils import epath
from moe_jax.parallel.compile_cache import CompileCacheConfig, kept_programs

seen = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: seen.update([event.split("/")[-1]]))
if "killed" in sys.argv:
    kind = type(epath.Path(sys.argv[1]))  # as JAX writes entries
    write = kind.write_bytes

    def cut(path, content):
        if path.name.endswith("-cache"):
            write(path, content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, content)

    kind.write_bytes = cut
with kept_programs(CompileCacheConfig(sys.argv[1]), print):
    jax.jit(lambda x: x * 2 + 1).lower(3.0).compile()
print("compiled", seen["cache_misses"], "read", seen["cache_hits"])
"""


@pytest.fixture(autouse=True)
def settings():
    """Restore JAX's own settings afterwards."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def process(cli_env, tmp_path):
    """`process("killed")` starts PROGRAM; `ended` returns (exit code, lines, standard error)."""
    env = {name: value for name, value in cli_env.items() if "CACHE" not in name}

    def start(*words: str) -> subprocess.Popen:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), *words]
        return subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return start


def ended(process: subprocess.Popen) -> tuple[int, list[str], str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out.splitlines(), err


def entry(folder, name: str, content: bytes = WHOLE, used: bytes | None = b"\1" * 8):
    path = folder / f"{name}-cache"
    path.write_bytes(content)
    if used is not None:
        (folder / f"{name}-atime").write_bytes(used)
    return path


def examined(folder, **config: object) -> tuple[set[str], list[str]]:
    """The entries left after a start, and the lines which that start printed."""
    said: list[str] = []
    with kept_programs(CompileCacheConfig(str(folder), **config), said.append):
        left = {path.name.removesuffix("-cache") for path in folder.glob("*-cache")}
    return left, said


def test_what_is_not_whole_is_removed(tmp_path):
    entry(tmp_path, "whole")
    entry(tmp_path, "unused", used=None)
    entry(tmp_path, "empty", b"")
    entry(tmp_path, "truncated", WHOLE[:-5])
    entry(tmp_path, "flipped", WHOLE[:20] + bytes([WHOLE[20] ^ 1]) + WHOLE[21:])
    entry(tmp_path, "text", b"no program")
    (tmp_path / "gone-atime").write_bytes(b"\1" * 8)
    left, said = examined(tmp_path)
    assert left == {"whole", "unused"}
    assert {path.name for path in tmp_path.glob("*-atime")} == {"whole-atime", "unused-atime"}
    assert said == [f"compiled programs are kept in {tmp_path}: 2 found, 4 removed as damaged"]


def test_a_sealed_entry_is_known_by_its_hash(tmp_path):
    """The damaged entry still decompresses, so only its SHA-256 can detect the damage."""
    path = entry(tmp_path, "sealed")
    other = entry(tmp_path, "other")
    assert examined(tmp_path)[0] == {"sealed", "other"}
    path.write_bytes(zlib.compress(b"another program"))
    assert examined(tmp_path)[0] == {"other"}
    seals = json.loads((tmp_path / compile_cache.SEALS).read_text())
    assert seals == {"other-cache": hashlib.sha256(other.read_bytes()).hexdigest()}
    (tmp_path / compile_cache.SEALS).write_text("[torn")
    assert examined(tmp_path)[0] == {"other"}


def test_an_entry_under_zstd(tmp_path):
    content = zstandard.ZstdCompressor().compress(bytes(range(256)) * 40)
    entry(tmp_path, "whole", content)
    entry(tmp_path, "truncated", content[:-5])
    assert examined(tmp_path)[0] == {"whole"}


def test_nothing_is_removed_while_another_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "PATIENCE", 0.1)
    entry(tmp_path, "half", WHOLE[:50])
    with filelock.FileLock(tmp_path / ".lockfile"):
        with pytest.raises(UserError, match=r"cannot be used .*has held \.lockfile for 0\.1 s"):
            examined(tmp_path)
        assert (tmp_path / "half-cache").exists()


def test_a_kill_in_the_middle_of_a_write(process, tmp_path):
    code, _, _ = ended(process("killed"))
    assert code == -9 and len(list(tmp_path.glob("*-cache"))) == 1
    code, lines, err = ended(process())
    assert code == 0 and "1 removed as damaged" in lines[0] and "Error" not in err
    assert lines[1] == "compiled 1 read 0"
    assert ended(process())[1][1] == "compiled 0 read 1"


@pytest.mark.lifecycle
def test_two_processes_write_at_once(process, tmp_path):
    for code, lines, err in [ended(one) for one in [process(), process()]]:
        assert code == 0 and lines[-1].startswith("compiled") and "Error" not in err
    code, lines, _ = ended(process())
    assert lines == [f"compiled programs are kept in {tmp_path}: 1 found", "compiled 0 read 1"]


def test_the_folder_is_bounded(tmp_path):
    large = zlib.compress(os.urandom(8000))
    bound = 3 * len(large)
    for number in range(3):
        entry(tmp_path, f"old{number}", large, used=number.to_bytes(8, "little"))
    with kept_programs(CompileCacheConfig(str(tmp_path), bound), lambda line: None):
        compilation_cache.reset_cache()
        jax.jit(lambda x: x * 3 + 2).lower(1.0).compile()
    left = {path.name for path in tmp_path.glob("*-cache")}
    assert "old0-cache" not in left and any(not name.startswith("old") for name in left)
    assert sum((tmp_path / name).stat().st_size for name in left) <= bound


def test_where_programs_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = default_folder()
    assert tmp_path in folder.parents and jax.__version__ in folder.name
    # The user's own folder is used, with JAX's own settings.
    with kept_programs(CompileCacheConfig(), lambda line: None):
        assert jax.config.jax_compilation_cache_dir not in (None, str(folder))
    jax.config.update("jax_compilation_cache_dir", None)
    with kept_programs(CompileCacheConfig(), lambda line: None):
        assert jax.config.jax_compilation_cache_dir == str(folder)
        assert folder.stat().st_mode & 0o777 == 0o700
    # A folder that other users can write to is not used.
    jax.config.update("jax_compilation_cache_dir", None)
    os.chmod(folder, 0o777)
    said: list[str] = []
    with kept_programs(CompileCacheConfig(), said.append):
        assert jax.config.jax_compilation_cache_dir is None
    assert said == [
        f"compiled programs are not kept: {folder} cannot be used (other users may write to it)"
    ]
    with kept_programs(CompileCacheConfig(max_bytes=0), said.append):
        assert not jax.config.jax_enable_compilation_cache


def test_a_folder_that_cannot_be_used(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match=r"compile_cache\.dir=.* cannot be used \(File exists\)"):
        examined(file)
    with pytest.raises(UserError, match=r"config\.compile_cache\.dir is 's3://bucket'"):
        examined("s3://bucket")
    with pytest.raises(UserError, match=r"compile_cache\.max_bytes is -1: set 0 or more"):
        examined(tmp_path, max_bytes=-1)
