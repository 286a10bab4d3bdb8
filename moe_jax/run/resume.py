"""Whether a run goes on as it began: its config and its text against those of the workdir."""

import dataclasses
from typing import Any

from moe_jax.config import Config, read_config
from moe_jax.data.store import Store
from moe_jax.errors import UserError
from moe_jax.files import json_files
from moe_jax.files.workdir import Folder
from moe_jax.moe.components import make_router
from moe_jax.moe.config import MoEConfig
from moe_jax.moe.types import Router
from moe_jax.record.provenance import DATA_RECORD
from moe_jax.run.resolve import Resolved

# What decides which tokens a step sees, how they are grouped, or what the router's parameters mean
# though their shapes agree: a resumed run must keep it.
_KEPT_ON_RESUME = (
    "seed",
    "train.batch_size",
    "data.source",
    "data.files",
    "data.field",
    "data.tokenizer",
    "data.sequence_length",
    "data.heldout_fraction",
    "data.mixture",
    "model.confine_attention",
    "model.moe.router",
    "model.moe.top_k",
    "model.moe.group_rows",
)


def saved_config(workdir: Folder) -> Config | None:
    """The resolved config of the run that is in `workdir`, if it has a checkpoint to go on from."""
    path, checkpoints = workdir / "config.json", workdir / "checkpoints"
    if not checkpoints.exists():
        return None
    if not checkpoints.is_dir():
        raise UserError(f"{checkpoints} is not a folder: move it away.")
    steps = any(entry.name.isdecimal() for entry in checkpoints.iterdir())
    if not path.exists() and not steps:
        return None
    try:
        return read_config(path)
    except (UserError, FileNotFoundError) as error:
        why = "it is missing" if isinstance(error, FileNotFoundError) else str(error).rstrip(".")
        raise UserError(
            f"{path}, which says what the checkpoints beside it are, cannot be used ({why}): bring "
            f"it back, or use another --workdir (with --init_from to keep the weights)."
        ) from None


def keep_groups(config: Config, saved: Config) -> Config:
    """Routing groups were resolved once, with the first mesh; they stay as they were."""
    if config.model.moe.group_rows:
        return config
    moe = dataclasses.replace(config.model.moe, group_rows=saved.model.moe.group_rows)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))


def check_resume(found: Resolved, saved: Config) -> list[str]:
    """Notes for the log; UserError where tokens, groups or the router would be others."""
    config = found.config
    for name in _KEPT_ON_RESUME:
        new, old = _get(config, name), _get(saved, name)
        if new != old:
            raise UserError(
                f"config.{name} is {new!r} but the run in this workdir has {old!r}: use that, or "
                f"another --workdir (with --init_from to keep the weights)."
            )
    steps, before = config.train.steps, saved.train.steps
    notes = [f"train.steps was {before}: the schedule follows {steps}"] if steps != before else []
    epochs, before = config.data.max_epochs, saved.data.max_epochs
    if epochs != before:
        notes.append(f"data.max_epochs was {before}, is {epochs}: same batches, another end")
    if config.mesh != saved.mesh:
        notes.append(f"mesh was {saved.mesh}, is {config.mesh}: same batches, equal to rounding")
    if found.components is None:
        return notes
    return notes + _changed_knobs(found.components.router, config.model.moe, saved.model.moe)


def _changed_knobs(router: Router, new: MoEConfig, old: MoEConfig) -> list[str]:
    """A line for each knob of the router that was another: some are turned on purpose in a run.

    DeepSeek-V3 (arXiv 2412.19437) trains its last tokens with an update rate of 0.  And one where
    the experts multiply in another precision.
    """
    after, before = vars(router), vars(make_router(old))
    lines = [
        f"ROUTER CHANGED: {name} of {new.router} was {before[name]} in this run and is {value} "
        f"from here on"
        for name, value in after.items()
        if before[name] != value
    ]
    if new.matmul != old.matmul:
        lines.append(f"model.moe.matmul was {old.matmul} in this run and is {new.matmul} from here")
    return lines


def check_same_text(store: Store, workdir: Folder) -> None:
    """Raises UserError when the files behind a resumed run's data have changed."""
    path = workdir / DATA_RECORD
    record = json_files.read(path) if path.exists() else {"fingerprint": store.fingerprint}
    if not isinstance(record, dict) or not store.same_text(record.get("fingerprint")):
        raise UserError(
            f"The text of the run in {workdir}, or its tokenizer, has changed since it began "
            f"({DATA_RECORD} there holds another fingerprint): bring the files back, or use "
            f"another --workdir (with --init_from to keep the weights)."
        )


def _get(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config
