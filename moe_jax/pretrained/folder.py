"""The folder of a run or of a saved model: its config, its checkpoints, a tokenizer."""

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
    """The resolved config and the checkpoints of a run or saved model; writes nothing.

    Args:
      folder: to read.
      call: what the user has written, at the head of each sentence.

    Raises:
      UserError: it is no such folder, or its config.json is missing or damaged.
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
            f"{call}: config.json, which says what its checkpoints hold, is missing: bring it back."
        ) from None
    if config.model.vocab_size < 1:  # a run writes the size that it has found
        raise UserError(f"{call}: model.vocab_size in config.json is 0: bring the run's file back.")
    return config, Checkpoints(folder / _CHECKPOINTS)


def write_folder(
    directory: str | os.PathLike[str],
    config: Config,
    step: int,
    tree: dict[str, Any],
    tokenizer: str,
) -> None:
    """Writes a folder that `load` and --init_from take.

    Args:
      directory: a folder that is empty or not there yet.
      config: the run's resolved config.
      step: of the weights.
      tree: what the checkpoint holds, layer by layer.
      tokenizer: name of the run's, as `load_tokenizer` takes it.

    Raises:
      UserError: the folder is not empty, or cannot be written; or the tokenizer's file is gone.
    """
    call, folder = f"save({os.fspath(directory)!r})", epath.Path(directory).expanduser()
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(
                f"{call}: it is there and not an empty folder: name one that is not there yet."
            )
        folder.mkdir(parents=True, exist_ok=True)
        save_tokenizer(tokenizer, folder)
        checkpoints = Checkpoints(folder / _CHECKPOINTS)
        checkpoints.save(step, tree)
        checkpoints.close()
        # Last: without it `load` refuses the folder, so one that was cut short is not taken.
        (folder / _CONFIG).write_text(sealed_json(config))
    except OSError as error:
        advice = "name another folder or change its permissions"
        raise cannot_write(f"{call}: it", error, advice) from None
