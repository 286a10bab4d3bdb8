"""Sends metrics to Weights & Biases through a separate process.

The client uses the network from threads, exit hooks and signal handlers.  A separate process may
hang or fail without harm: rows then wait in memory, up to a limit, and the run continues.
"""

import collections
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.config import Config, to_dict
from moe_jax.errors import UserError
from moe_jax.files import json_files
from moe_jax.files.workdir import Folder, is_remote
from moe_jax.files.write_errors import cannot_write

ID_FILE = "wandb.json"
CLOSE_TIMEOUT = 30.0  # seconds for which the process may delay the end of a run
MAX_WAITING = 2000  # rows and texts held in memory; when there are more, the oldest is lost
FAILED = 1  # exit code of the process after it reported an error
_CHILD = pathlib.Path(__file__).with_name("wandb_child.py")


def check_wandb(config: Config) -> None:
    """Raise UserError if the config asks for Weights & Biases and it is not installed."""
    # Python finds a folder `wandb`, which its runs create, as a package without an origin.
    found = importlib.util.find_spec("wandb") if config.wandb.project else None
    if config.wandb.project and (found is None or found.origin is None):
        raise UserError(
            f"config.wandb.project is {config.wandb.project!r} and wandb is not installed: "
            f"pip install 'moe_jax[wandb]', or set wandb.project=''."
        )


def run_id(workdir: Folder) -> str:
    """The id of the run on Weights & Biases, the same for all attempts in a workdir.

    Raises:
      UserError: a new id cannot be written.
    """
    path = workdir / ID_FILE
    try:
        record = json_files.read(path)
        found = record.get("id") if isinstance(record, Mapping) else None
        if isinstance(found, str) and found.isalnum() and len(found) <= 64:
            return found
    except (FileNotFoundError, UserError):
        pass  # a damaged id is replaced: only the link to the earlier attempts is lost
    new = uuid.uuid4().hex[:12]
    try:
        json_files.replace_text(path, json.dumps({"id": new}) + "\n")
    except OSError as error:
        raise cannot_write(path, error, "change its permissions") from None
    return new


class WandbTracker:
    """Passes rows and texts to the process; only `close` waits for it.

    Args:
      workdir: folder of the run; the client's own files go to WORKDIR/wandb or, if the workdir is
        in an object store, to the temporary folder.
      config: the resolved config.
      temporary: a local folder.
      say: receives a line with the run's address, and one per error.

    Raises:
      UserError: the run's id cannot be written.
    """

    def __init__(
        self,
        workdir: Folder,
        config: Config,
        temporary: pathlib.Path,
        say: Callable[[str], None],
    ):
        self._say = say
        self._waiting: collections.deque[bytes] = collections.deque()
        self._lost, self._ending = 0, False
        self._changed = threading.Condition()
        wandb = config.wandb
        folder = temporary if is_remote(workdir) else workdir
        self._put(
            {
                "project": wandb.project,
                "entity": wandb.entity or None,
                "name": wandb.name or workdir.name,
                "id": run_id(workdir),
                "mode": wandb.mode,
                "dir": str(folder),
                "config": to_dict(config),
            }
        )
        # -P keeps our modules beside the script off the import path.  A new session, so that
        # Ctrl-C reaches only the trainer, which then ends this process.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            # Inside the workdir, because a kill may leave a link to it (see wandb_child.py).
            env={"WANDB_CACHE_DIR": f"{folder}/wandb/cache", **os.environ},
        )
        self._threads = [
            threading.Thread(target=target, name="wandb", daemon=True)
            for target in (self._send, self._listen)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, step: int, scalars: list[tuple[str, float]]) -> None:
        """Queue the (tag, number) pairs of a step."""
        self._put({"row": {"step": step, **dict(scalars)}})

    def text(self, step: int, tag: str, text: str) -> None:
        """Queue a text."""
        self._put({"texts": [step, tag, text]})

    def close(self) -> None:
        """Wait CLOSE_TIMEOUT seconds for the process to end, then kill it."""
        self._put({"end": 0})
        with self._changed:
            self._ending = True
            self._changed.notify()
        try:
            code = self._process.wait(CLOSE_TIMEOUT)
            if code not in (0, FAILED):
                self._say(f"wandb ended with exit code {code}. The run continued without it.")
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._say(f"wandb took longer than {CLOSE_TIMEOUT:g} s to end and was killed.")
        for thread in self._threads:
            thread.join(1.0)
        if self._lost + len(self._waiting):
            self._say(f"wandb: {self._lost + len(self._waiting)} rows are lost.")

    def _put(self, record: Mapping[str, Any]) -> None:
        with self._changed:
            if len(self._waiting) == MAX_WAITING:
                self._waiting.popleft()
                self._lost += 1
            self._waiting.append(json.dumps(record).encode() + b"\n")
            self._changed.notify()

    def _send(self) -> None:
        """Write the queue to the process, in a thread because a hanging process blocks the pipe."""
        pipe = self._process.stdin
        assert pipe is not None
        try:
            while True:
                with self._changed:
                    while not self._waiting and not self._ending:
                        self._changed.wait()
                    if not self._waiting:
                        break
                    line = self._waiting.popleft()
                pipe.write(line)
                pipe.flush()
            pipe.close()
        except OSError:  # the process is gone; `_listen` has reported why
            with self._changed:
                self._lost += 1

    def _listen(self) -> None:
        """Report the lines that the process prints."""
        pipe = self._process.stdout
        assert pipe is not None
        for line in pipe:
            text = line.decode(errors="replace").strip()
            failed = " The run continues without it." if text.startswith("wandb failed") else ""
            self._say(f"{text}{failed}")
