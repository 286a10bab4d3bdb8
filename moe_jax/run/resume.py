"""Whether a run goes on as it began: its config and its text against those of the workdir."""

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
    """The resolved config of the run that is in `workdir`, if it has a checkpoint to go on from."""
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
    """Routing groups were resolved once, with the first mesh; they stay as they were."""
    if config.model.moe.group_rows:
        return config
    moe = dataclasses.replace(config.model.moe, group_rows=saved.model.moe.group_rows)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))


def check_resume(config: Config, saved: Config) -> list[str]:
    """Compares a resolved config with that of the run that it goes on with.

    DeepSeek-V3 (arXiv 2412.19437) trains its last tokens with an update rate of 0: knobs of the
    router, and whatever else decides neither the weights nor the data, may change.

    Returns:
      A line for the log for each key that has another value.

    Raises:
      UserError: the weights would compute another function, or a step would see other tokens.
    """
    changed = changes(saved, config)
    refused = of_kind(changed, (Decides.WEIGHTS, Decides.DATA))
    if refused:
        keeps = not of_kind(changed, (Decides.WEIGHTS,))
        raise UserError(
            f"{sentence(refused, 'in this workdir')}: use that, or another --workdir"
            f"{' (with --init_from to keep the weights)' if keeps else ''}."
        )
    return lines(changed, saved, config)


def data_record(store: Store) -> dict[str, Any]:
    """What data.json says of a store beside its fingerprint."""
    return {
        "content": store.content,
        "tokenizer": store.tokenizer,
        "streams": list(store.streams),
        "documents": len(store.train.documents) + len(store.heldout.documents),
        "tokens": store.train.num_tokens + store.heldout.num_tokens,
    }


def check_tokenizer(identity: str, workdir: Folder) -> None:
    """Raises UserError where a resumed run has another tokenizer, before any text is read."""
    if _data(workdir).get("tokenizer", identity) != identity:
        raise _changed_text(workdir, "data.tokenizer names another tokenizer")


def check_same_text(store: Store, workdir: Folder) -> None:
    """Raises UserError where the content behind a resumed run's data is another."""
    recorded, now = _data(workdir), data_record(store)
    if not recorded or store.same_text(recorded["fingerprint"]):
        return
    if store.content and recorded.get("content") == store.content:  # files with other names
        return
    named = [key for key in now if key != "content"]  # a hash tells nobody anything
    others = (key for key in named if key in recorded and recorded[key] != now[key])
    key = next(others, None)
    what = f"it has {now[key]!r} {key} and had {recorded[key]!r}" if key else "another fingerprint"
    raise _changed_text(workdir, what)


def _data(workdir: Folder) -> Mapping[str, Any]:
    """WORKDIR/data.json; empty where nothing was saved yet and there is none."""
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
        f"{path}, which says what the checkpoints beside it are, cannot be used ({why}): bring "
        f"it back, or use another --workdir (with --init_from to keep the weights)."
    )


def _changed_text(workdir: Folder, what: str) -> UserError:
    return UserError(
        f"The text of the run in {workdir}, or its tokenizer, has changed since it began "
        f"({DATA_RECORD} there: {what}): "
        f"bring the files back, or use another --workdir (with --init_from to keep the weights)."
    )
