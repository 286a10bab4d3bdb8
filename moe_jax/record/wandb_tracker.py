"""Weights & Biases beside TensorBoard, in a process of its own.

The client talks to a network from threads, exit hooks and signal handlers.  A process of its own
may hang or fail: rows then wait in memory, up to a limit, and the run goes on.
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
CLOSE_TIMEOUT = 30.0  # seconds for which it may hold up the end of a run
MAX_WAITING = 2000  # rows and texts; beyond them the oldest is lost
FAILED = 1  # exit code of the process once it has said why
_CHILD = pathlib.Path(__file__).with_name("wandb_child.py")


def check_wandb(config: Config) -> None:
    """Raises UserError where Weights & Biases is asked for and not installed."""
    # A folder `wandb`, which its runs make, is found as a package without an origin.
    found = importlib.util.find_spec("wandb") if config.wandb.project else None
    if config.wandb.project and (found is None or found.origin is None):
        raise UserError(
            f"config.wandb.project is {config.wandb.project!r} and wandb is not installed: "
            f"pip install 'moe_jax[wandb]', or set wandb.project=''."
        )


def run_id(workdir: Folder) -> str:
    """The id of the run on Weights & Biases, the same for all attempts in a workdir.

    Raises:
      UserError: it is a new one and cannot be written.
    """
    path = workdir / ID_FILE
    try:
        record = json_files.read(path)
        found = record.get("id") if isinstance(record, Mapping) else None
        if isinstance(found, str) and found.isalnum() and len(found) <= 64:
            return found
    except (FileNotFoundError, UserError):
        pass  # a damaged one is replaced: what is lost is a line on a page
    new = uuid.uuid4().hex[:12]
    try:
        json_files.replace_text(path, json.dumps({"id": new}) + "\n")
    except OSError as error:
        raise cannot_write(path, error, "change its permissions") from None
    return new


class WandbTracker:
    """Hands rows and texts to the process; no call waits for it but `close`.

    Args:
      workdir: folder of the run; the client's own files go to WORKDIR/wandb, or, for one of an
        object store, to the temporary folder.
      config: of the run, resolved.
      temporary: a local folder.
      say: gets a line where the run is shown, and one for each thing that goes wrong.

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
        # -P: the folder of the script holds modules of ours.  A session of its own: Ctrl-C is for
        # the trainer, which then ends this process.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            # Inside the workdir: a kill may leave a link to it (see wandb_child.py).
            env={"WANDB_CACHE_DIR": f"{folder}/wandb/cache", **os.environ},
        )
        self._threads = [
            threading.Thread(target=target, name="wandb", daemon=True)
            for target in (self._send, self._listen)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, step: int, scalars: list[tuple[str, float]]) -> None:
        """Hand over the (tag, number) pairs of a step."""
        self._put({"row": {"step": step, **dict(scalars)}})

    def text(self, step: int, tag: str, text: str) -> None:
        """Hand over a text."""
        self._put({"texts": [step, tag, text]})

    def close(self) -> None:
        """Let the process end by itself for CLOSE_TIMEOUT seconds, then end it."""
        self._put({"end": 0})
        with self._changed:
            self._ending = True
            self._changed.notify()
        try:
            code = self._process.wait(CLOSE_TIMEOUT)
            if code not in (0, FAILED):
                self._say(f"wandb ended with exit code {code}. The run went on without it.")
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._say(f"wandb took longer than {CLOSE_TIMEOUT:g} s to end and was ended.")
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
        """In a thread: a process that hangs reads nothing, and the pipe is full."""
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
        except OSError:  # it is gone; `_listen` has said why
            with self._changed:
                self._lost += 1

    def _listen(self) -> None:
        """Says what the process says."""
        pipe = self._process.stdout
        assert pipe is not None
        for line in pipe:
            text = line.decode(errors="replace").strip()
            failed = " The run goes on without it." if text.startswith("wandb failed") else ""
            self._say(f"{text}{failed}")
