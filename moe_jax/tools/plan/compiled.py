"""What XLA makes of a plan: read from a compilation in a process of its own.

XLA first optimises the program and lays out its memory, which takes seconds, and then generates
machine code, which takes minutes and tells nothing more.  Both parts of what a plan needs are
dumped in between, so the process is ended there, unless the executable itself is wanted.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from moe_jax.config import to_json
from moe_jax.errors import UserError
from moe_jax.tools.hlo import Collectives, read_collectives
from moe_jax.tools.plan.lowering import Plan
from moe_jax.tools.plan.topology import Topology

_MODULE = "jit_train_step"
_POLL = 0.2  # seconds
_TELL = 10  # seconds between lines of progress


@dataclasses.dataclass(frozen=True)
class Compiled:
    """XLA's program for one device."""

    seconds: float
    peak: int  # bytes at the fullest moment: arguments, results, temporaries, landing buffers
    arguments: int  # bytes of state and batch
    collectives: Collectives | None  # None where the program is too large to exist
    error: str = ""  # XLA's reason where it does not fit
    digest: str = ""  # SHA-256 of the saved executable


def compile_plan(
    plan: Plan,
    topology: Topology,
    say: Callable[[str], None],
    *,
    config_file: str = "",
    save: str = "",
) -> Compiled:
    """Compile the train step of `plan`.

    Args:
      plan: resolved for the topology's devices.
      topology: what to compile for.
      say: called with a line every ten seconds.
      config_file: FILE.py[:ARG] that registers the plan's own router or dispatch path, which the
        other process has to know as well; empty: the plan has none.
      save: path for the executable; it takes minutes longer.

    Raises:
      UserError: XLA refuses the program for another reason than its size.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="moe_jax_plan_") as name:
        folder = Path(name)
        (folder / "config.json").write_text(to_json(plan.config))
        worker_main = [sys.executable, "-m", "moe_jax.tools.plan.worker"]
        command = [*worker_main, name, topology.name, save, config_file]
        with open(folder / "log", "wb") as log:
            worker = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=_environment(folder)
            )
        try:
            _wait(worker, folder, began, say, whole=bool(save))
        finally:
            worker.kill()
            worker.wait()
        return _read(folder, time.perf_counter() - began)


def _environment(folder: Path) -> dict[str, str]:
    """The worker's: it imports what we import, and dumps what it knows of the train step."""
    dump = f"--xla_dump_to={folder} --xla_dump_hlo_module_re={_MODULE}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {dump}".strip()
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)}


def _wait(
    worker: subprocess.Popen, folder: Path, began: float, say: Callable[[str], None], whole: bool
) -> None:
    """Until the worker ends, or memory is laid out where that suffices."""
    told = began
    while worker.poll() is None:
        # Written after the two that are read below, which are whole by then.
        if not whole and _dump(folder, "_after_buffer_assignment"):
            return
        if time.perf_counter() - told >= _TELL:
            told = time.perf_counter()
            say(f"compiling: {told - began:.0f} s")
        time.sleep(_POLL)


def _dump(folder: Path, stage: str) -> Path | None:
    return next(folder.glob(f"*{_MODULE}*after_optimizations{stage}.txt"), None)


def _read(folder: Path, seconds: float) -> Compiled:
    """The dumps, or why there are none."""
    log = (folder / "log").read_text(errors="replace")
    program = _dump(folder, "")
    memory = _dump(folder, "-memory-usage-report")
    buffers = _dump(folder, "-buffer-assignment")
    done = folder / "result.json"
    result = json.loads(done.read_text()) if done.exists() else {}
    if needed := _needed(log):
        return Compiled(seconds, needed, 0, None, _reason(log))
    if program is None or memory is None or buffers is None:
        raise UserError(f"XLA cannot compile this plan: {_reason(log)}.")
    collectives = read_collectives(program.read_text())
    # The first total is that of the device's main memory; newer libtpus add to it what computations
    # called by others keep for themselves, which lies in their callers' temporaries.
    total = int(re.findall(r"^Total bytes: (\d+)", memory.read_text(), re.M)[0])
    found = re.findall(
        r"^allocation \d+: size (\d+), (?:page \d+, )?(thread-local|parameter)",
        buffers.read_text(),
        re.M,
    )
    inner, arguments = (
        sum(int(size) for size, kind in found if kind == one)
        for one in ("thread-local", "parameter")
    )
    # Every all-to-all has a landing buffer of its own, which no layout of memory shows:
    # finished executables ask for that much more (docs/planning.md).
    landing = sum(one.bytes for one in collectives.found if one.op == "all-to-all")
    return Compiled(
        seconds,
        result.get("peak") or int(total - inner + landing),
        arguments,
        collectives,
        digest=result.get("digest", ""),
    )


def _needed(log: str) -> int:
    """Bytes that XLA says a too large program needs; 0 where it says nothing of the kind."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", log)
    return int(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1)) if found else 0


def _reason(log: str) -> str:
    """The last line of the worker's log that says something."""
    lines = [line.strip() for line in log.splitlines() if "Error" in line or "EXHAUSTED" in line]
    return (lines or log.strip().splitlines() or ["it ended without a word"])[-1].rstrip(".")
