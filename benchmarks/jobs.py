"""Runs commands as separate processes side by side on devices, with time limits and logs."""

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

GRACE = 10  # seconds that a process has to end its children after its time limit


@dataclasses.dataclass(frozen=True)
class Job:
    """Commands that run one after another, up to the first that fails."""

    name: str  # also the name of its logs
    commands: tuple[tuple[str, ...], ...]
    devices: int = 1
    alone: bool = False  # True: no other job runs beside it, because it is bound by the host
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Outcome(NamedTuple):
    """The result of a job."""

    error: str  # empty: success
    seconds: float
    outputs: tuple[str, ...]  # standard output of each command that ran


Work = Callable[[Job, Sequence[str]], Outcome]


def run(command: Sequence[str], env: Mapping[str, str], limit: float, log: Path) -> tuple[str, str]:
    """Run a process for at most `limit` seconds; return (error or "", standard output).

    Standard output goes to `log`.out and standard error to `log`.err while it runs.  A process that
    starts processes itself calls `end_with_children`.
    """
    out, err = (log.with_name(f"{log.name}.{kind}") for kind in ("out", "err"))
    error = ""
    with out.open("w") as to_out, err.open("w") as to_err:
        try:
            nothing = subprocess.DEVNULL
            with subprocess.Popen(
                command, env={**env}, stdin=nothing, stdout=to_out, stderr=to_err
            ) as process:
                code = _wait(process, limit)
            if code is None:
                error = f"not done after {limit:g} s"
            elif code:
                error = f"exit code {code}, {_last_line(err) or 'nothing said'}"
        except OSError as caught:
            error = f"not started: {caught.strerror}"
    return error, out.read_text(errors="replace")


def _wait(process: subprocess.Popen, limit: float) -> int | None:
    """Wait for the exit code; after `limit` seconds end the process and return None."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return None
    finally:
        process.kill()  # has no effect if the process has ended


def end_with_children() -> None:
    """Turn SIGTERM into an exception, so that the process this one waits for is ended too."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def run_job(job: Job, env: Mapping[str, str], limit: float, folder: Path) -> Outcome:
    """Run the commands of a job one after another; `limit` is for all of them together."""
    began, outputs, error = time.monotonic(), [], ""
    for number, command in enumerate(job.commands):
        log = folder / (job.name if len(job.commands) == 1 else f"{job.name}-{number}")
        left = max(1.0, round(limit - (time.monotonic() - began)))
        error, output = run(command, {**env, **job.env}, left, log)
        outputs.append(output)
        if error:
            break
    return Outcome(error, time.monotonic() - began, tuple(outputs))


def schedule(
    jobs: Sequence[Job],
    devices: Sequence[str],
    work: Work,
    say: Callable[[str], None],
    keep: Callable[[Mapping[str, Outcome]], None] = lambda outcomes: None,
) -> dict[str, Outcome]:
    """Run every job when enough devices are free; return the outcomes by name.

    After each job, `keep` gets all outcomes so far.  A job that needs more devices than there are
    fails at once.  An exception of `work` ends all jobs.
    """
    outcomes = {
        job.name: Outcome(f"needs {job.devices} devices, here are {len(devices)}", 0.0, ())
        for job in jobs
        if job.devices > len(devices)
    }
    waiting = [job for job in jobs if job.name not in outcomes]
    # Jobs that run alone come last, because devices would be idle until all other jobs ended.
    waiting.sort(key=lambda job: job.alone)
    free, running = list(devices), dict[Future[Outcome], tuple[Job, list[str]]]()
    with ThreadPoolExecutor(max_workers=max(1, len(devices))) as pool:
        while waiting or running:
            for job in tuple(waiting):
                needed = len(devices) if job.alone else job.devices
                if needed <= len(free):
                    taken, free = free[:needed], free[needed:]
                    waiting.remove(job)
                    say(f"{job.name}: started")
                    running[pool.submit(work, job, taken[: job.devices])] = job, taken
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, taken = running.pop(future)
                free += taken
                outcomes[job.name] = outcome = future.result()
                say(f"{job.name}: {outcome.error or 'done'}, {outcome.seconds:.0f} s")
                keep(outcomes)
    return {job.name: outcomes[job.name] for job in jobs}


def last_json(text: str) -> dict[str, Any] | None:
    """Parse the last line that is a JSON object; None: there is none."""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else None


def last_table(text: str) -> str:
    """Return the last Markdown table."""
    lines = text.splitlines()
    end = max((i + 1 for i, line in enumerate(lines) if line.startswith("|")), default=0)
    start = end
    while start and lines[start - 1].startswith("|"):
        start -= 1
    return "\n".join(lines[start:end])


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
