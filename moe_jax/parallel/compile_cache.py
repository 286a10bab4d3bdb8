"""Keeps compiled programs on disk, so that the next start of a process need not compile them.

The folder is JAX's persistent compilation cache.  JAX does not check an entry that it reads: one
truncated by a kill would cause a warning at every start and never be replaced.  This module
therefore examines the folder before JAX reads it.  An entry is complete if its SHA-256 matches
`SEALS` or, if it is not listed there, if it decompresses to its end.
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

SEALS = "seals.json"  # entry -> SHA-256 of the complete file
_LOCK = ".lockfile"  # JAX's lock, held while it reads or writes an entry
_ENTRY, _USED = "-cache", "-atime"  # JAX's suffixes: a program, and the time of its last use
PATIENCE = 10.0  # seconds to wait for a process that writes an entry; JAX waits as long
_HIT = "/jax/compilation_cache/cache_hits"
_ZSTD = b"\x28\xb5\x2f\xfd"  # the magic number of a zstd frame; RFC 8878, 3.1.1


@dataclasses.dataclass(frozen=True)
class CompileCacheConfig:
    """The folder of compiled programs, which the next start loads instead of compiling."""

    # Folder of the compiled programs. Empty: JAX_COMPILATION_CACHE_DIR with JAX's own settings if
    # it is set, otherwise a folder below ~/.cache/moe_jax for this user, jax version and CPU type.
    dir: Run[str] = ""
    # Maximum size of the folder in bytes; the least recently used programs are deleted first. 0:
    # no programs are kept.
    max_bytes: Run[Annotated[int, at_least(0)]] = 2**30

    def __post_init__(self):
        bounds.check(self, "compile_cache.")


@contextlib.contextmanager
def kept_programs(config: CompileCacheConfig, say: Callable[[str], None]) -> Iterator[None]:
    """Use the cache while the body runs: JAX loads programs from it and adds those it compiles.

    With several processes, only process 0 writes (JAX's rule).  Enter this after
    `distributed.start` and before anything is compiled.

    Args:
      config: the folder and its maximum size.
      say: called with lines for the start-up log.

    Raises:
      UserError: the folder that `config.dir` names cannot be used.
    """
    if not config.max_bytes:
        jax.config.update("jax_enable_compilation_cache", False)
        yield
        return
    if not config.dir and jax.config.jax_compilation_cache_dir:
        yield  # the user has configured JAX's cache
        return
    check_scheme(config.dir, "config.compile_cache.dir")
    if "://" in config.dir:  # JAX can neither lock nor limit a cache in an object store
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
            with contextlib.suppress(OSError, filelock.Timeout):  # the next start examines again
                _seal(folder)


@contextlib.contextmanager
def counted_hits() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the number of programs loaded from the cache in the body."""
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
    """The default folder for this user, jax version and CPU type.

    The CPU type is part of its name because a program compiled for another CPU may not run.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    name = f"jax-{jax.__version__}-jaxlib-{jaxlib.version.__version__}-{_cpu_type()}"
    return pathlib.Path(cache).expanduser() / "moe_jax" / "compiled" / name


def _cpu_type() -> str:
    """The CPU's architecture and a hash of its instruction sets, such as `x86_64-3fb2c1d0`."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        lines = [f"model name: {platform.processor()}"]
    names = ("model name", "flags", "features", "cpu part")  # x86 and Arm
    said = sorted({line for line in lines if line.lower().startswith(names)})
    digest = hashlib.sha256("\n".join(said).encode()).hexdigest()[:8]
    return f"{platform.machine() or 'cpu'}-{digest}"


def _tell_jax(folder: str, max_bytes: int) -> None:
    for name, value in {
        "jax_compilation_cache_dir": folder,
        "jax_compilation_cache_max_size": max_bytes,
        # A start compiles about a hundred small programs besides the train step.
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }.items():
        jax.config.update(name, value)


def _usable(given: str, say: Callable[[str], None]) -> pathlib.Path | None:
    """Create and return the folder; if the default one cannot be used, log why and return None.

    Raises:
      UserError: the folder that the user named cannot be used.
    """
    folder = pathlib.Path(given).expanduser().absolute() if given else default_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with filelock.FileLock(folder / _LOCK, timeout=PATIENCE):
            pass
        why = "" if given else _foreign(folder)
    except filelock.Timeout:
        why = f"another process has held {_LOCK} for {PATIENCE:g} s"
    except (OSError, NotImplementedError) as error:  # NotImplementedError: no file locks here
        why = getattr(error, "strerror", None) or str(error)
    if not why:
        return folder
    advice = "name another folder, or set compile_cache.max_bytes=0"
    if given:
        raise UserError(f"config.compile_cache.dir={given} cannot be used ({why}): {advice}.")
    say(f"compiled programs are not kept: {folder} cannot be used ({why})")
    return None


def _foreign(folder: pathlib.Path) -> str:
    """The reason why other users could add programs that this process would run; "": none."""
    found = folder.stat()
    if found.st_uid != os.getuid():
        return "it belongs to another user"
    return "other users may write to it" if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else ""


def _examine(folder: pathlib.Path, say: Callable[[str], None]) -> None:
    """Remove incomplete entries and log how many entries are left."""
    try:
        with filelock.FileLock(folder / _LOCK, timeout=PATIENCE):
            removed = _remove_damaged(folder)
            kept = len(list(folder.glob(f"*{_ENTRY}")))
    except (OSError, filelock.Timeout) as error:
        say(f"compiled programs in {folder} could not be examined ({error})")
        return
    damaged = f", {removed} removed as damaged" if removed else ""
    say(f"compiled programs are kept in {folder}: {kept} found{damaged}")


def _remove_damaged(folder: pathlib.Path) -> int:
    """Remove damaged entries and return their number; the others get a seal and a time of use."""
    seals, removed, known = _read_seals(folder), 0, {}
    for path in folder.glob(f"*{_ENTRY}"):
        seal = _examined(path, seals.get(path.name))
        if seal is None:
            path.unlink(missing_ok=True)
            removed += 1
            continue
        known[path.name] = seal
        used = _use_of(path)
        if not used.exists():  # JAX evicts nothing if one such file is missing
            used.write_bytes(time.time_ns().to_bytes(8, "little"))
    for used in folder.glob(f"*{_USED}"):
        if used.name.removesuffix(_USED) + _ENTRY not in known:
            used.unlink(missing_ok=True)
    _write_seals(folder, known)
    return removed


def _seal(folder: pathlib.Path) -> None:
    """Add the seals of new entries; the others were examined before JAX read them."""
    with filelock.FileLock(folder / _LOCK, timeout=PATIENCE):
        seals, known = _read_seals(folder), {}
        for path in folder.glob(f"*{_ENTRY}"):
            seal = seals.get(path.name) or _examined(path, None)
            if seal is not None:
                known[path.name] = seal
        _write_seals(folder, known)


def _examined(path: pathlib.Path, seal: str | None) -> str | None:
    """The SHA-256 of an entry, or None if it is damaged."""
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
        except ImportError:  # JAX cannot read it either: it names zstd entries differently
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
