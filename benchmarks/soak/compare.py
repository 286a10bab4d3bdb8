"""Lists the differences between two runs that should be equal."""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_jax.checkpoint import Checkpoints

_TIMES = ("_seconds", "_per_second")  # endings of keys that depend on time
_ROWS = ("metrics.jsonl", "ledger.jsonl")


def differences(expected: Path, found: Path, steps: int) -> list[str]:
    """List the differences between the runs in `found` and `expected`, one line each.

    Compares every leaf of the checkpoint of step `steps` bit by bit, every row of both logs without
    times, the sample texts, and every byte of the stores next to the two workdirs.
    """
    jax.config.update("jax_platforms", "cpu")  # the platform of the runs
    return [
        *_of_checkpoints(expected / "checkpoints", found / "checkpoints", steps),
        *itertools.chain.from_iterable(_of_rows(expected, found, name) for name in _ROWS),
        *_of_files("samples", _hashes(expected, "samples.txt"), _hashes(found, "samples.txt")),
        *_of_files(
            "store",
            _hashes(expected.parent / "stores", "*/**/*"),
            _hashes(found.parent / "stores", "*/**/*"),
        ),
    ]


def _of_checkpoints(expected: Path, found: Path, step: int) -> list[str]:
    ours, theirs = Checkpoints(expected), Checkpoints(found)
    lines = [f"checkpoint {name} was quarantined" for name in theirs.quarantined()]
    for checkpoints in (ours, theirs):
        if step not in checkpoints.steps():
            return [*lines, f"{checkpoints.root} has no step {step}"]
        reason = checkpoints.verify(step)
        if reason:
            return [*lines, f"{checkpoints.root / str(step)} is bad: {reason}"]
    shapes = ours.describe(step)
    if shapes != theirs.describe(step):
        return [*lines, f"the checkpoints of step {step} have different leaves"]
    pairs = ours.restore(step, shapes), theirs.restore(step, shapes)
    for name in shapes:
        a, b = (np.asarray(leaves[name]) for leaves in pairs)
        if a.tobytes() != b.tobytes():
            count = int((np.atleast_1d(a) != np.atleast_1d(b)).sum())
            lines.append(f"checkpoint {step}: {name} differs in {count} of {a.size} values")
    return lines


def _of_rows(expected: Path, found: Path, name: str) -> list[str]:
    ours, theirs = ([_plain(row) for row in _rows(folder / name)] for folder in (expected, found))
    for number, (a, b) in enumerate(itertools.zip_longest(ours, theirs, fillvalue={}), 1):
        keys = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
        if keys:
            key = keys[0]
            return [
                f"{name}:{number}: {key} is {b.get(key)}, should be {a.get(key)} (step "
                f"{a.get('step')}; {len(ours)} rows there, {len(theirs)} here)"
            ]
    return []


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: v for key, v in row.items() if not key.endswith(_TIMES) and key != "mfu"}


def _hashes(folder: Path, pattern: str) -> dict[str, str]:
    files = (path for path in folder.glob(pattern) if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def _of_files(what: str, expected: dict[str, str], found: dict[str, str]) -> list[str]:
    names = sorted(expected.keys() | found.keys())
    return [f"{what}: {n} differs" for n in names if expected.get(n) != found.get(n)]
