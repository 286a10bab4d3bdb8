"""Compiled programs, kept on disk from one start of a process to the next.

The folder is JAX's persistent compilation cache.  JAX writes an entry in one go and reads it as it
is: one that a kill has cut would be warned of at each start and never replaced.  So the folder is
examined before JAX reads it.  What was written whole is known by a SHA-256 (`SEALS`), or else by
its compression, which has a beginning and an end.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import platform
import stat
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Annotated

import filelock
import jax
import jaxlib.version

from moe_jax import bounds
from moe_jax.bounds import at_least
from moe_jax.decides import Run
from moe_jax.errors import UserError
from moe_jax.files import json_files
from moe_jax.files.schemes import check_scheme
from moe_jax.parallel import distributed

SEALS = "seals.json"  # entry -> SHA-256 of a file that was whole
_LOCK = ".lockfile"  # JAX's own, held while it reads or writes an entry
_ENTRY, _USED = "-cache", "-atime"  # JAX's names: a program, and when it was last used
PATIENCE = 10.0  # seconds to wait for a process that writes an entry, as long as JAX does
_HIT = "/jax/compilation_cache/cache_hits"
_ZSTD = b"\x28\xb5\x2f\xfd"  # what zstd's frames begin with; RFC 8878, 3.1.1


@dataclasses.dataclass(frozen=True)
class CompileCacheConfig:
    """Where compiled programs are kept, so that the next start need not compile them again."""

    # Empty: JAX_COMPILATION_CACHE_DIR where that is set, with JAX's own settings, or else a folder
    # of this user, jax version and CPU type below ~/.cache/moe_jax.
    dir: Run[str] = ""
    # Bytes of the folder; the programs used longest ago go first; 0: nothing is kept.
    max_bytes: Run[Annotated[int, at_least(0)]] = 2**30

    def __post_init__(self):
        bounds.check(self, "compile_cache.")


@contextlib.contextmanager
def kept_programs(config: CompileCacheConfig, say: Callable[[str], None]) -> Iterator[None]:
    """While the body runs, JAX takes programs from the cache and adds those that it compiles.

    Of several processes process 0 alone writes, which is JAX's rule.  Call it after the processes
    have met and before anything is compiled.

    Args:
      config: where, and how much.
      say: called with lines for the start-up log.

    Raises:
      UserError: the folder that `config.dir` names cannot be used.
    """
    if not config.max_bytes:
        jax.config.update("jax_enable_compilation_cache", False)
        yield
        return
    if not config.dir and jax.config.jax_compilation_cache_dir:
        yield  # the user's own arrangement
        return
    check_scheme(config.dir, "config.compile_cache.dir")
    if "://" in config.dir:  # a store replaces whole objects; there JAX can lock and bound nothing
        _tell_jax(config.dir, -1)
        yield
        return
    folder = _usable(config.dir, say)
    if folder is None:
        yield
        return
    if distributed.lead():
        _examine(folder, say)
    _tell_jax(str(folder), config.max_bytes)
    try:
        yield
    finally:
        if distributed.lead():
            with contextlib.suppress(OSError, filelock.Timeout):  # the next start examines anew
                _seal(folder)


@contextlib.contextmanager
def counted_hits() -> Iterator[Callable[[], int]]:
    """A function that says how many programs came from the cache since the body began."""
    hits = 0

    def listen(event: str, **_: object) -> None:
        nonlocal hits
        hits += event == _HIT

    jax.monitoring.register_event_listener(listen)
    try:
        yield lambda: hits
    finally:
        jax.monitoring.unregister_event_listener(listen)


def default_folder() -> pathlib.Path:
    """The folder of this user, jax version and CPU type; programs for another CPU may not run."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    name = f"jax-{jax.__version__}-jaxlib-{jaxlib.version.__version__}-{_cpu_type()}"
    return pathlib.Path(cache).expanduser() / "moe_jax" / "compiled" / name


def _cpu_type() -> str:
    """Such as `x86_64-3fb2c1d0`: the instructions that a CPU has, as a hash."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        lines = [f"model name: {platform.processor()}"]
    names = ("model name", "flags", "features", "cpu part")  # of x86 and of Arm
    said = sorted({line for line in lines if line.lower().startswith(names)})
    digest = hashlib.sha256("\n".join(said).encode()).hexdigest()[:8]
    return f"{platform.machine() or 'cpu'}-{digest}"


def _tell_jax(folder: str, max_bytes: int) -> None:
    for name, value in {
        "jax_compilation_cache_dir": folder,
        "jax_compilation_cache_max_size": max_bytes,
        # A start compiles a hundred small programs beside the train step.
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }.items():
        jax.config.update(name, value)


def _usable(given: str, say: Callable[[str], None]) -> pathlib.Path | None:
    """The folder, made; None, and a line, where the default one cannot be used.

    Raises:
      UserError: the folder that the user has named cannot be used.
    """
    folder = pathlib.Path(given).expanduser().absolute() if given else default_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with filelock.FileLock(folder / _LOCK, timeout=PATIENCE):
            pass
        why = "" if given else _foreign(folder)
    except filelock.Timeout:
        why = f"another process has held {_LOCK} for {PATIENCE:g} s"
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        why = getattr(error, "strerror", None) or str(error)
    if not why:
        return folder
    advice = "name another folder, or set compile_cache.max_bytes=0"
    if given:
        raise UserError(f"config.compile_cache.dir={given} cannot be used ({why}): {advice}.")
    say(f"compiled programs are not kept: {folder} cannot be used ({why})")
    return None


def _foreign(folder: pathlib.Path) -> str:
    """Why others may put programs into the folder, which this process would run; "" if none can."""
    found = folder.stat()
    if found.st_uid != os.getuid():
        return "it belongs to another user"
    return "other users may write to it" if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else ""


def _examine(folder: pathlib.Path, say: Callable[[str], None]) -> None:
    """Removes what is not whole, and says what is there."""
    try:
        with filelock.FileLock(folder / _LOCK, timeout=PATIENCE):
            removed = _remove_damaged(folder)
            kept = len(list(folder.glob(f"*{_ENTRY}")))
    except (OSError, filelock.Timeout) as error:
        say(f"compiled programs in {folder} could not be examined ({error})")
        return
    damaged = f", {removed} damaged removed" if removed else ""
    say(f"compiled programs are kept in {folder}: {kept} there{damaged}")


def _remove_damaged(folder: pathlib.Path) -> int:
    """How many entries were removed; those that stay have a seal and a time of use."""
    seals, removed, known = _read_seals(folder), 0, {}
    for path in folder.glob(f"*{_ENTRY}"):
        seal = _examined(path, seals.get(path.name))
        if seal is None:
            path.unlink(missing_ok=True)
            removed += 1
            continue
        known[path.name] = seal
        used = _use_of(path)
        if not used.exists():  # JAX evicts nothing where one is missing
            used.write_bytes(time.time_ns().to_bytes(8, "little"))
    for used in folder.glob(f"*{_USED}"):
        if used.name.removesuffix(_USED) + _ENTRY not in known:
            used.unlink(missing_ok=True)
    _write_seals(folder, known)
    return removed


def _seal(folder: pathlib.Path) -> None:
    """Adds the seals of entries that have none; JAX has the others in memory as it read them."""
    with filelock.FileLock(folder / _LOCK, timeout=PATIENCE):
        seals, known = _read_seals(folder), {}
        for path in folder.glob(f"*{_ENTRY}"):
            seal = seals.get(path.name) or _examined(path, None)
            if seal is not None:
                known[path.name] = seal
        _write_seals(folder, known)


def _examined(path: pathlib.Path, seal: str | None) -> str | None:
    """The SHA-256 of an entry that is whole, or None."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    found = hashlib.sha256(content).hexdigest()
    whole = _decompresses(content) if seal is None else seal == found
    return found if whole else None


def _decompresses(content: bytes) -> bool:
    if content.startswith(_ZSTD):
        try:
            import zstandard
        except ImportError:  # nor can JAX read it, which gives such entries names of their own
            return True
        try:
            return bool(zstandard.ZstdDecompressor().decompress(content))
        except zstandard.ZstdError:
            return False
    try:
        return bool(zlib.decompress(content))
    except zlib.error:
        return False


def _use_of(entry: pathlib.Path) -> pathlib.Path:
    return entry.with_name(entry.name.removesuffix(_ENTRY) + _USED)


def _read_seals(folder: pathlib.Path) -> dict[str, str]:
    try:
        found = json_files.load(folder / SEALS)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_seals(folder: pathlib.Path, seals: dict[str, str]) -> None:
    json_files.replace_text(folder / SEALS, json.dumps(seals, indent=1, sort_keys=True) + "\n")
