"""Runs training jobs as processes of this machine, a limited number at a time."""

import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from launch.job import Job
from moe_jax.files.links import break_hard_link

# Exit code of the trainer: run the same command again.  It was preempted (checkpoint saved), the
# watchdog fired, or a peer was lost.
STOPPED = 42
ATTEMPTS = 20  # per run, while its exit code is STOPPED
LOG = "train.log"  # in a run's workdir: everything that the trainer prints
_WAKE_SECONDS = 0.5
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def command(job: Job) -> list[str]:
    """The command that starts a job on this machine."""
    return [sys.executable, "-m", "moe_jax", "train", *job.arguments]


class Local:
    """Runs jobs.  After SIGTERM or Ctrl-C running jobs save a checkpoint and none is started."""

    def __init__(self, workdir: Path, parallel: int, say: Callable[[str], None]):
        self._workdir, self._parallel, self._say = workdir, parallel, say
        self._live: list[subprocess.Popen[str]] = []
        self.stopping = False
        self._mutex = threading.Lock()

    def run(self, jobs: Sequence[Job]) -> dict[str, int | None]:
        """Run all jobs to their ends; returns name -> exit code (None: not started)."""
        before = {number: signal.signal(number, self._stop) for number in _SIGNALS}
        try:
            with ThreadPoolExecutor(self._parallel) as pool:
                numbered = [(f"[{i}/{len(jobs)}]", job) for i, job in enumerate(jobs, 1)]
                futures = [pool.submit(self._one, tag, job) for tag, job in numbered]
                # The kernel may deliver a signal to any thread, but Python runs the handler in
                # this one, which must wake up for it.
                while wait(futures, timeout=_WAKE_SECONDS).not_done:
                    pass
                codes = [future.result() for future in futures]
                return dict(zip([job.name for job in jobs], codes, strict=True))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _one(self, tag: str, job: Job) -> int | None:
        """Run one job; run it again while it exits with STOPPED, at most ATTEMPTS times."""
        code = None
        for _ in range(ATTEMPTS):
            process = self._start(tag, job)
            if process is None:
                break
            code = self._follow(tag, job, process)
            if code != STOPPED:
                break
            self._say(f"{tag} {job.name} asks to be run again")
        return code

    def _start(self, tag: str, job: Job) -> subprocess.Popen[str] | None:
        """Start a job; None if we are stopping.

        It gets its own session, so that Ctrl-C reaches it only as the SIGTERM that we send.
        """
        with self._mutex:
            if self.stopping:
                return None
            self._say(f"{tag} + {shlex.join(command(job))}")
            process = subprocess.Popen(
                command(job),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
            self._live.append(process)
        return process

    def _follow(self, tag: str, job: Job, process: subprocess.Popen[str]) -> int:
        """Copy the output to the job's log, and its steps to the screen; returns the exit code."""
        log = self._workdir / job.name / LOG
        log.parent.mkdir(parents=True, exist_ok=True)
        line = ""
        assert process.stdout is not None
        break_hard_link(log)
        with log.open("a", encoding="utf-8") as file, process.stdout:
            for line in process.stdout:
                file.write(line)
                file.flush()
                if line.startswith("step "):
                    self._say(f"{tag} {line.rstrip()}")
        code = process.wait()
        with self._mutex:
            self._live.remove(process)
        if code not in (0, STOPPED):
            self._say(f"{tag} exit code {code}: {line.strip()} (all output: {log})")
        return code

    def _stop(self, *_: object) -> None:
        # Runs in the main thread, which never holds the mutex, so this cannot deadlock.  It waits
        # for a process that is being started, and then stops that one too.
        with self._mutex:
            self.stopping = True
            for process in self._live:
                process.terminate()
