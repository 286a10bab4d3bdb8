"""Checks before a resume that config, tokenizer and text fit the run in the workdir."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_jax.config import Config, UnregisteredError, read_config
from moe_jax.data.store import Store
from moe_jax.decides import Decides
from moe_jax.errors import UserError
from moe_jax.files import json_files, records, seals
from moe_jax.files.workdir import Folder
from moe_jax.record.provenance import CONFIG_RECORD, DATA_RECORD
from moe_jax.run.changes import changes, lines, of_kind, sentence


def saved_config(workdir: Folder) -> Config | None:
    """The resolved config of the run in `workdir`; None if there is no checkpoint to resume from.

    Raises:
      UserError: config.json is missing or damaged, or `checkpoints` is not a folder.
    """
    path, checkpoints = workdir / CONFIG_RECORD, workdir / "checkpoints"
    if not checkpoints.exists():
        return None
    if not checkpoints.is_dir():
        raise UserError(f"{checkpoints} is not a folder: move it away.")
    if not path.exists() and not _has_steps(workdir):
        return None
    try:
        return read_config(path)
    except UnregisteredError:
        raise
    except (UserError, FileNotFoundError) as error:
        raise _unusable(path, error) from None


def keep_groups(config: Config, saved: Config) -> Config:
    """Keep the group_rows that the saved run resolved on its first mesh, if `config` sets none."""
    if config.model.moe.group_rows:
        return config
    moe = dataclasses.replace(config.model.moe, group_rows=saved.model.moe.group_rows)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))


def check_resume(config: Config, saved: Config) -> list[str]:
    """Compare a resolved config with that of the run that it resumes.

    Keys that decide neither the weights nor the data may change, such as those of the router:
    DeepSeek-V3 (arXiv 2412.19437) trains its last tokens with a bias update rate of 0.

    Returns:
      A log line for each key that differs.

    Raises:
      UserError: the weights would compute a different function, or a step would see other tokens.
    """
    changed = changes(saved, config)
    refused = of_kind(changed, (Decides.WEIGHTS, Decides.DATA))
    if refused:
        keeps = not of_kind(changed, (Decides.WEIGHTS,))
        raise UserError(
            f"{sentence(refused, 'in this workdir')}. Set the old value, or use a new --workdir"
            f"{' (with --init_from to keep the weights)' if keeps else ''}."
        )
    return lines(changed, saved, config)


def data_record(store: Store) -> dict[str, Any]:
    """The fields of data.json that describe a store, apart from its fingerprint."""
    return {
        "content": store.content,
        "tokenizer": store.tokenizer,
        "streams": list(store.streams),
        "documents": len(store.train.documents) + len(store.heldout.documents),
        "tokens": store.train.num_tokens + store.heldout.num_tokens,
    }


def check_tokenizer(identity: str, workdir: Folder) -> None:
    """Check, before any text is read, that a resumed run has the tokenizer that it began with.

    Raises:
      UserError: the tokenizer differs.
    """
    if _data(workdir).get("tokenizer", identity) != identity:
        raise _changed_text(workdir, "data.tokenizer differs")


def check_same_text(store: Store, workdir: Folder) -> None:
    """Check that a resumed run has the text that it began with.

    Raises:
      UserError: the text differs.
    """
    recorded, now = _data(workdir), data_record(store)
    if not recorded or store.same_text(recorded["fingerprint"]):
        return
    if store.content and recorded.get("content") == store.content:  # only file names changed
        return
    named = [key for key in now if key != "content"]  # a hash would not help the user
    others = (key for key in named if key in recorded and recorded[key] != now[key])
    key = next(others, None)
    what = f"{key} was {recorded[key]!r}, is {now[key]!r}" if key else "the fingerprint differs"
    raise _changed_text(workdir, what)


def _data(workdir: Folder) -> Mapping[str, Any]:
    """Read WORKDIR/data.json; empty if the file is missing and nothing was saved yet."""
    path = workdir / DATA_RECORD
    try:
        found = seals.unsealed(json_files.read(path))
        records.text(found.get("fingerprint"))
        return found
    except FileNotFoundError as error:
        if _has_steps(workdir):
            raise _unusable(path, error) from None
        return {}
    except (UserError, ValueError) as error:
        raise _unusable(path, error) from None


def _has_steps(workdir: Folder) -> bool:
    folder = workdir / "checkpoints"
    return folder.is_dir() and any(entry.name.isdecimal() for entry in folder.iterdir())


def _unusable(path: Folder, error: Exception) -> UserError:
    why = "it is missing" if isinstance(error, FileNotFoundError) else str(error).rstrip(".")
    return UserError(
        f"{path}, which describes the checkpoints, cannot be used ({why}): restore the file, or "
        f"use a new --workdir (with --init_from to keep the weights)."
    )


def _changed_text(workdir: Folder, what: str) -> UserError:
    return UserError(
        f"The text or the tokenizer of the run in {workdir} has changed since it began "
        f"({DATA_RECORD} there: {what}): "
        f"restore the files, or use a new --workdir (with --init_from to keep the weights)."
    )
