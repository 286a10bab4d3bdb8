"""Check many runs at once, without data and without training; launch/sweep.py runs it first.

python -m moe_jax check [--devices=N] < LINES

Each line on stdin is a JSON list: the arguments of one `python -m moe_jax train`.  For each line
one JSON object is printed: {"problem": SENTENCE or null, "finished": BOOL, "changed": [KEY, ...]}.
`changed` lists the keys whose values differ from those that a finished run used.  --devices is the
number of devices that a run will have; without it, the number of devices of this machine.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from moe_jax.cli.commands import COMMANDS
from moe_jax.cli.parse import parse
from moe_jax.config import Config, from_config_dict, read_config
from moe_jax.config_file import apart
from moe_jax.errors import UserError
from moe_jax.files import json_files, records
from moe_jax.files.workdir import Folder, locate
from moe_jax.model.define import define
from moe_jax.parallel.platforms import check_platforms
from moe_jax.record.report import METRICS, has_last_eval
from moe_jax.run.changes import changes
from moe_jax.run.context import make_optimizer
from moe_jax.run.resolve import check_shapes
from moe_jax.run.samples import check_samples
from moe_jax.run.setup import resolve_config


def main(argv: Sequence[str]) -> int:
    """Read stdin and answer each line; return 0 whatever the answers are.

    Raises:
      UserError: a line is not a list of arguments.
    """
    given = parse(argv, COMMANDS["check"]).flags
    if not given.devices:
        check_platforms()
    for arguments in list(_read_runs(sys.stdin)):
        # A config file may print, and what it registers must not be known to the next one.
        with contextlib.redirect_stdout(sys.stderr), apart():
            answer = check(arguments, given.devices or jax.device_count())
        print(json.dumps(answer), flush=True)
    return 0


def _read_runs(lines: Iterable[str]) -> Iterator[list[str]]:
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                yield records.names(json_files.parse(line))
        except ValueError as error:
            raise UserError(
                f"Line {number} of standard input is not a JSON list of train's arguments "
                f"({error})."
            ) from None


def check(arguments: Sequence[str], num_devices: int) -> dict[str, Any]:
    """Describe what is wrong with one run (None: nothing), and whether it is already finished."""
    problem, finished, changed = None, False, []
    try:
        config, workdir = checked(arguments, num_devices)
        finished = has_last_eval(workdir / METRICS, config.train.steps, config.data.max_epochs)
        changed = _changed(config, workdir) if finished else []
    except UserError as error:
        problem = str(error)
    except Exception as error:  # such as one from a router that the config file defines
        problem = f"{type(error).__name__}: {error}"
    return {"problem": problem, "finished": finished, "changed": changed}


def checked(arguments: Sequence[str], num_devices: int) -> tuple[Config, Folder]:
    """The resolved config of a run, and its workdir.

    Raises:
      UserError: the trainer would refuse the run before it reads any data.
    """
    parsed = parse(["moe_jax train", *arguments], COMMANDS["train"])
    workdir = locate(parsed.flags.workdir)
    config, components, _ = resolve_config(
        from_config_dict(parsed.config), workdir, num_devices, parsed.flags.init_from
    )
    sizes = dataclasses.asdict(config.mesh)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    model = define(config.model, jnp.float32, components)
    check_shapes(model, mesh)
    check_samples(config)
    make_optimizer(config, model)
    return config, workdir


def _changed(config: Config, workdir: Folder) -> list[str]:
    """The keys that differ from the workdir's config.json, except mesh.*; none if it is missing."""
    try:
        record = read_config(workdir / "config.json")
    except (FileNotFoundError, UserError):
        return []
    keys = (change.key for change in changes(record, config))
    return sorted(key for key in keys if not key.startswith("mesh."))
