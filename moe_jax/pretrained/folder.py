"""Reads and writes the folder of a run or saved model: config, checkpoints, tokenizer."""

import os
from typing import Any

from etils import epath

from moe_jax.checkpoint import Checkpoints
from moe_jax.config import Config, read_config, sealed_json
from moe_jax.errors import UserError
from moe_jax.files.write_errors import cannot_write
from moe_jax.pretrained.tokenizer import save_tokenizer

_CONFIG, _CHECKPOINTS = "config.json", "checkpoints"


def open_folder(folder: epath.Path, call: str) -> tuple[Config, Checkpoints]:
    """The resolved config and the checkpoints of a run or saved model; writes no files.

    Args:
      folder: the folder to read.
      call: the call that the user wrote; error messages begin with it.

    Raises:
      UserError: it is not such a folder, or its config.json is missing or damaged.
    """
    if not (folder / _CHECKPOINTS).is_dir():
        raise UserError(
            f"{call}: no checkpoints/ in it: name the workdir of a run or a folder that "
            f"LoadedModel.save wrote."
        )
    try:
        config = read_config(folder / _CONFIG)
    except FileNotFoundError:
        raise UserError(
            f"{call}: config.json, which describes its checkpoints, is missing: restore it."
        ) from None
    if config.model.vocab_size < 1:  # a run records the size of its tokenizer
        raise UserError(f"{call}: model.vocab_size in config.json is 0: restore the run's file.")
    return config, Checkpoints(folder / _CHECKPOINTS)


def write_folder(
    directory: str | os.PathLike[str],
    config: Config,
    step: int,
    tree: dict[str, Any],
    tokenizer: str,
) -> None:
    """Write a folder that `load` and --init_from accept.

    Args:
      directory: a folder that is empty or does not exist.
      config: the run's resolved config.
      step: the step of the weights.
      tree: the tree to save, with unstacked layers.
      tokenizer: name of the run's tokenizer, as `load_tokenizer` takes it.

    Raises:
      UserError: the folder is not empty or cannot be written, or the tokenizer's file is missing.
    """
    call, folder = f"save({os.fspath(directory)!r})", epath.Path(directory).expanduser()
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(
                f"{call}: it exists and is not an empty folder: name one that does not exist."
            )
        folder.mkdir(parents=True, exist_ok=True)
        save_tokenizer(tokenizer, folder)
        checkpoints = Checkpoints(folder / _CHECKPOINTS)
        checkpoints.save(step, tree)
        checkpoints.close()
        # Last, because `load` refuses a folder without it, and so refuses an interrupted save.
        (folder / _CONFIG).write_text(sealed_json(config))
    except OSError as error:
        advice = "name another folder or change its permissions"
        raise cannot_write(f"{call}: it", error, advice) from None
