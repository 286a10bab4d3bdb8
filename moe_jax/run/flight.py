"""The flight record: a JSON file with what is needed to examine and repeat a skipped step."""

import collections
import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from moe_jax.config import fingerprint
from moe_jax.errors import UserError
from moe_jax.files import json_files
from moe_jax.files.workdir import Folder
from moe_jax.files.write_errors import cannot_write
from moe_jax.parallel.distributed import lead
from moe_jax.record.provenance import versions
from moe_jax.record.report import to_json_value
from moe_jax.record.rewind import Rewinds
from moe_jax.record.settings import read_settings
from moe_jax.run.context import Run
from moe_jax.train.step import StepMetrics

FLIGHT = "flight"
MAX_RECORDS = 20  # records per run
STEPS = 50  # whose metrics a record holds before those of the skipped step

Row = dict[str, Any]


def record_path(workdir: Folder, step: int) -> Folder:
    """The path of the newest record of a step, whether or not it exists."""
    return workdir / FLIGHT / str(step) / "record.json"


class FlightRecorder:
    """Keeps the metrics of the last steps in memory and writes a record of a skipped step.

    Process 0 writes WORKDIR/flight/<step>/record.json.  If a step is skipped again with other
    data, after a rewind, the older record is renamed to record.1.json, record.2.json and so on.

    Args:
      row: makes a metrics row of a step's metrics (`step_log.step_row`); called only when a
        record is written.
    """

    def __init__(
        self,
        run: Run,
        rewinds: Rewinds,
        row: Callable[[StepMetrics], Row],
        say: Callable[[str], None],
    ):
        self._run, self._rewinds, self._row, self._say = run, rewinds, row, say
        self._steps: collections.deque[tuple[int, StepMetrics]] = collections.deque(
            maxlen=STEPS + 1
        )

    def saw(self, step: int, metrics: StepMetrics) -> None:
        """Add the metrics of `step`, already on the host."""
        self._steps.append((step, metrics))

    def write(self, why: str, last: bool = False) -> None:
        """Write a record of the newest step; the run continues if that fails.

        A run keeps at most MAX_RECORDS records.  With `last` (the skipped step that ends the run)
        the record is written regardless.
        """
        if not lead():
            return
        step, _ = self._steps[-1]
        folder = self._run.workdir / FLIGHT
        try:
            if len(list(folder.glob("*/record*.json"))) >= MAX_RECORDS and not last:
                self._say(
                    f"flight record of step {step} not written: {folder} holds {MAX_RECORDS} "
                    f"records, move some away"
                )
                return
            self._replace(record_path(self._run.workdir, step), self._record(step, why))
        except OSError as error:
            said = cannot_write(folder, error, "change its permissions")
            self._say(f"flight record of step {step} not written: {said}")
        except UserError as error:
            self._say(f"flight record of step {step} not written: {error}")

    def _replace(self, path: Folder, record: Row) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and _data_step(path) != record["data_step"]:
            number = 1
            while (aside := path.with_name(f"record.{number}.json")).exists():
                number += 1
            path.rename(aside)
        json_files.replace_text(path, json.dumps(record, allow_nan=False) + "\n")

    def _record(self, step: int, why: str) -> Row:
        run, data_step = self._run, self._rewinds.data_step(step - 1)
        history = [{"step": n, **to_json_value(self._row(metrics))} for n, metrics in self._steps]
        return {
            "step": step,
            "why": why,
            "row": history[-1],
            "data_step": data_step,
            "rewinds": len(self._rewinds.history),  # records of rewinds.jsonl in force then
            "settings": len(read_settings(run.workdir)),  # records of settings.jsonl in force then
            "batch": _batch(run, data_step),
            "rng": {
                "seed": run.config.seed,
                "implementation": "threefry2x32",
                "step": step - 1,
                "key": "fold_in(fold_in(key(seed), step), row), row of the global batch",
            },
            "config": fingerprint(run.config),
            "mesh": dataclasses.asdict(run.config.mesh),
            "devices": math.prod(run.mesh.devices.shape),
            "versions": versions(),
            "history": history,
        }


def _batch(run: Run, data_step: int) -> Row:
    """The window and the sources of every row of the global batch."""
    row_ids = np.arange(run.batches.batch_size)
    batch, names = run.batches.rows(data_step, row_ids), run.store.sources
    pairs = zip(batch.sources_BT, batch.loss_mask_BT, strict=True)
    return {
        "rows": row_ids.tolist(),
        "windows": run.batches.window_ids(data_step, row_ids).tolist(),
        "sources": [[names[i] for i in np.unique(source[mask])] for source, mask in pairs],
    }


def _data_step(path: Folder) -> int | None:
    try:
        return json_files.load(path)["data_step"]
    except (ValueError, TypeError, KeyError):
        return None
