"""Compiles a plan in a separate process, and reads XLA's dumps.

XLA first optimises the program and assigns its memory, which takes seconds, and then generates
machine code, which takes minutes.  The dumps that a plan needs are written in between, so the
process is killed there, unless the executable itself is wanted.
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
    peak: int  # peak bytes: arguments, results, temporaries, receive buffers
    arguments: int  # bytes of state and batch
    collectives: Collectives | None  # None: XLA made no program, because it does not fit
    error: str = ""  # XLA's message if the program does not fit
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
      config_file: FILE.py[:ARG] that registers the plan's own router or dispatch path in the other
        process; empty: the plan has none.
      save: path for the executable, which takes minutes longer; empty: do not save.

    Raises:
      UserError: XLA refuses the program for a reason other than its size.
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
    """The worker's environment: our import path, and XLA's dumps of the train step."""
    dump = f"--xla_dump_to={folder} --xla_dump_hlo_module_re={_MODULE}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {dump}".strip()
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)}


def _wait(
    worker: subprocess.Popen, folder: Path, began: float, say: Callable[[str], None], whole: bool
) -> None:
    """Wait until the worker ends or, without `whole`, until XLA has assigned the memory."""
    told = began
    while worker.poll() is None:
        # XLA writes this dump after those that _read needs, which are then complete.
        if not whole and _dump(folder, "_after_buffer_assignment"):
            return
        if time.perf_counter() - told >= _TELL:
            told = time.perf_counter()
            say(f"compiling: {told - began:.0f} s so far")
        time.sleep(_POLL)


def _dump(folder: Path, stage: str) -> Path | None:
    return next(folder.glob(f"*{_MODULE}*after_optimizations{stage}.txt"), None)


def _read(folder: Path, seconds: float) -> Compiled:
    """Read the dumps; raises UserError if there are none."""
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
    # The first total is of the device's main memory.  Newer versions of libtpu add the buffers of
    # called computations, which are inside the temporaries of their callers.
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
    # Every all-to-all has its own receive buffer, which the memory assignment leaves out: finished
    # executables need that much more (docs/planning.md).
    landing = sum(one.bytes for one in collectives.found if one.op == "all-to-all")
    return Compiled(
        seconds,
        result.get("peak") or int(total - inner + landing),
        arguments,
        collectives,
        digest=result.get("digest", ""),
    )


def _needed(log: str) -> int:
    """The bytes that a program needs by XLA's out-of-memory message; 0: no such message."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", log)
    return int(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1)) if found else 0


def _reason(log: str) -> str:
    """The last line of the worker's log with an error, or its last line."""
    lines = [line.strip() for line in log.splitlines() if "Error" in line or "EXHAUSTED" in line]
    return (lines or log.strip().splitlines() or ["it ended without a message"])[-1].rstrip(".")
