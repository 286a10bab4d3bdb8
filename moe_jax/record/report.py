"""Reports a run: JSON lines, TensorBoard, Weights & Biases, and a bar or plain lines."""

import contextlib
import math
import os
import pathlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from moe_jax.config import Config, to_json
from moe_jax.errors import UserError
from moe_jax.files import json_files, records
from moe_jax.files.lines import JsonLinesWriter
from moe_jax.files.workdir import Folder, Mirror, is_remote
from moe_jax.files.write_errors import cannot_write
from moe_jax.record.heat_map import LOAD_MEANS, expert_load, heat_map
from moe_jax.record.screen import Screen, open_screen
from moe_jax.record.tags import LOAD, TEXTS, scalars, unused
from moe_jax.record.wandb_tracker import WandbTracker

METRICS = "metrics.jsonl"
LEDGER = "ledger.jsonl"
COPY_TIMEOUT = 10.0  # seconds for which a copy to an object store may block the run
LAST_COPY_TIMEOUT = 120.0  # the same at the end of the run
_BOARD = "tensorboard"  # folder of the event files


class Reporter:
    """Writes and shows the rows of a run, on the lead process.

    A row is a dict with `step` and numbers; per-layer lists are under `layers`, and other nested
    dicts (per source, for example) are allowed.  A number that is not finite becomes a string
    ("nan", "inf", "-inf"), so that every line is valid JSON and float() still reads the value.

    After its construction a Reporter never ends a run: rows that a full disk refuses wait in memory
    (`GrowingFile`), and files that an object store refuses are copied later.

    Args:
      workdir: folder of the run; in an object store, files are copied to it every half minute, at
        each `flush` and at the end.
      total_steps: the last step of the run.
      resumed_step: the restored step; later rows are moved to a tail file.  None: a new run.
      config: config of the run, which trackers show as text; metrics that it does not use are
        left out of the trackers.  None: no metric is left out.
      screen: shows lines and rows; None: a new one is opened.

    Raises:
      UserError: the folder cannot be written.
    """

    def __init__(
        self,
        workdir: Folder,
        total_steps: int,
        resumed_step: int | None,
        config: Config | None = None,
        screen: Screen | None = None,
    ):
        self._workdir, self._mirror = workdir, Mirror(workdir)
        self._copies = _Copies(self._mirror, self.say) if is_remote(workdir) else None
        done = resumed_step or 0
        self._unused = frozenset() if config is None else unused(config)
        self._screen = open_screen() if screen is None else screen
        self._screen.begin(total_steps, done)
        with contextlib.ExitStack() as failed:
            failed.callback(self._screen.close)
            with self._writing():
                self._mirror.folder.mkdir(parents=True, exist_ok=True)
                for name in (METRICS, LEDGER):
                    self._mirror.fetch(f"{name}*")
                self._files = self._open(resumed_step)
            self._wandb = None
            if config is not None:
                self.text(done, "config", to_json(config))
                if config.wandb.project:
                    folder = self._mirror.folder
                    self._wandb = WandbTracker(workdir, config, folder, self.say)
            failed.pop_all()

    def _open(self, resumed_step: int | None) -> "_Files":
        there = self._workdir / _BOARD
        names = [path.name for path in there.iterdir()] if there.exists() else []
        return _Files(self._mirror.folder, resumed_step, names, self.say)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = f"--workdir={self._workdir}"
            raise cannot_write(
                what, error, "choose another folder or change its permissions"
            ) from None

    def rewind(self, step: int) -> None:
        """Move the rows after `step` to a tail file, as when a run is resumed from `step`.

        Raises:
          UserError: the folder cannot be written.
        """
        self._files.close()
        with self._writing():
            self._files = self._open(step)

    def log(self, row: Mapping[str, Any]) -> None:
        """Append `row` to metrics.jsonl and the trackers, and show it."""
        row = {name: to_json_value(value) for name, value in row.items()}
        self._files.metrics.append(row)
        tagged = list(scalars(row, self._unused))
        self._files.board.add(row["step"], tagged)
        if self._wandb:
            self._wandb.add(row["step"], tagged)
        self._screen.show(row)
        if self._copies:
            self._copies.start(self._mirror.push_if_due)

    def ledger(self, row: Mapping[str, Any]) -> None:
        """Append `row` to ledger.jsonl, and the load of each expert to TensorBoard."""
        self._files.ledger.append(row)
        load_LE = expert_load(row)
        if load_LE is not None:
            self._files.board.image(row["step"], LOAD, heat_map(load_LE), LOAD_MEANS)

    def text(self, step: int, name: str, text: str) -> None:
        """Add a text, such as a sample, to the trackers; `name` is a key of `TEXTS`."""
        self._files.board.text(step, TEXTS[name], text)
        if self._wandb:
            self._wandb.text(step, TEXTS[name], text)

    def flush(self) -> None:
        """Copy the files to the object store, if the workdir is in one."""
        if self._copies:
            self._copies.start(self._mirror.push)

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self._screen.say(text)

    def close(self) -> None:
        """End the bar, close the files and make the last copies."""
        self._screen.close()
        self._files.close()
        if self._wandb:
            self._wandb.close()
        if self._copies:
            self._copies.finish()

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SilentReporter:
    """The reporter of every process but the lead: it writes and shows nothing."""

    def rewind(self, step: int) -> None:
        """Do nothing."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Do nothing."""

    def ledger(self, row: Mapping[str, Any]) -> None:
        """Do nothing."""

    def text(self, step: int, name: str, text: str) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def say(self, text: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class _Copies:
    """Copies to an object store, one at a time; each blocks its caller for a limited time.

    A store may take hours to answer without raising an error.
    """

    def __init__(self, mirror: Mirror, say: Callable[[str], None]):
        self._mirror, self._say, self._failed = mirror, say, ""
        self._thread: threading.Thread | None = None  # the copy that has not ended yet

    def start(self, copy: Callable[[], None]) -> None:
        """Run `copy`, unless an earlier one still runs: the next copy includes the same files."""
        if not self._ended(0.0):
            return
        self._begin(copy)
        if not self._ended(COPY_TIMEOUT):
            self._say(f"{self._late(COPY_TIMEOUT)} The run continues.")
        elif self._failed:
            self._say(f"{self._failed} Trying again later.")

    def finish(self) -> None:
        """Wait for the current copy, then make the last one."""
        if self._ended(LAST_COPY_TIMEOUT):
            self._begin(self._mirror.close)
        if not self._ended(LAST_COPY_TIMEOUT):
            self._say(
                f"{self._late(LAST_COPY_TIMEOUT)} The rows are kept in {self._mirror.folder}."
            )
        elif self._failed:
            self._say(self._failed)

    def _begin(self, copy: Callable[[], None]) -> None:
        self._failed = ""
        self._thread = threading.Thread(target=self._run, args=[copy], daemon=True)
        self._thread.start()

    def _run(self, copy: Callable[[], None]) -> None:
        try:
            copy()
        except UserError as error:
            self._failed = str(error)

    def _ended(self, seconds: float) -> bool:
        """True if no copy is running after a wait of up to `seconds`."""
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return False
            self._thread = None
        return True

    def _late(self, seconds: float) -> str:
        return f"A copy of the rows to the object store takes longer than {seconds:g} s."


class _Files:
    """The files of a reporter, continued after `resumed_step` (None: a new run)."""

    def __init__(
        self,
        folder: pathlib.Path,
        resumed_step: int | None,
        event_files: Sequence[str],
        say: Callable[[str], None],
    ):
        for name in (METRICS, LEDGER):
            truncate(folder / name, resumed_step)
        self.metrics, self.ledger = (
            JsonLinesWriter(folder / name, say) for name in (METRICS, LEDGER)
        )
        from moe_jax.record.board import Board  # takes seconds if torch is installed

        purge_step = None if resumed_step is None else resumed_step + 1
        self.board = Board(folder / _BOARD, event_files, purge_step, say)

    def close(self) -> None:
        self.board.close()
        self.metrics.close()
        self.ledger.close()


def truncate(path: pathlib.Path, step: int | None) -> None:
    """Keep the rows of a metrics file up to `step` (None: no row), atomically.

    The other lines, including a torn last line, are moved to `<name>.<n>.tail` beside it, n from 1.
    """
    if not path.exists():
        return
    kept, tail = [], []
    for line in json_files.read_lines(path):
        row = read_row(line) if line.endswith(b"\n") else None
        keep = row is not None and step is not None and row["step"] <= step
        (kept if keep else tail).append(line)
    if not tail:
        return
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}.tail")).exists():
        number += 1
    # The tail first: a kill between the two writes loses no row, it only stores the tail twice.
    for target, lines in ((aside, tail), (path, kept)):
        unfinished = target.with_name(f"{target.name}.new")
        unfinished.write_bytes(b"".join(lines))
        os.replace(unfinished, target)


def has_last_eval(path: Folder, steps: int, max_epochs: int) -> bool:
    """True if a metrics file holds the held-out results of the end of a run.

    Args:
      path: the metrics file; it may be missing.
      steps: train.steps, the last step of the run.
      max_epochs: data.max_epochs, which may have ended the run earlier; 0: no limit.
    """
    return any(is_last(row, steps, max_epochs) for row in _rows(path))


def is_last(row: Mapping[str, Any], steps: int, max_epochs: int) -> bool:
    """True if a row holds the held-out results of the end of a run (see `has_last_eval`)."""
    used_up = max_epochs > 0 and row.get("max_epochs") == max_epochs and row["step"] < steps
    return "eval_loss" in row and (row["step"] == steps or used_up)


def _rows(path: Folder) -> Iterator[dict[str, Any]]:
    for line in json_files.read_lines(path) if path.exists() else ():
        row = read_row(line)
        if row is not None:
            yield row


def read_row(line: bytes) -> dict[str, Any] | None:
    """The row in a line of metrics.jsonl; None if it is not an object with an integer `step`."""
    return records.parse_line(line, _row)


def _row(value: Any) -> dict[str, Any]:
    row = records.mapping(value)
    records.count(row.get("step"))
    return row


def to_json_value(value: Any) -> Any:
    """Convert numbers, arrays and nested containers to JSON values."""
    if isinstance(value, Mapping):
        return {str(name): to_json_value(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_value(part) for part in value]
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        return to_json_value(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
