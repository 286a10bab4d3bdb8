"""The run whose weights another one begins with: `--init_from`."""

import dataclasses

from etils import epath

from moe_jax.checkpoint import Checkpoints
from moe_jax.config import Config
from moe_jax.decides import Decides
from moe_jax.errors import UserError
from moe_jax.pretrained.folder import open_folder
from moe_jax.run.changes import Change, changes, lines, of_kind, sentence


def open_origin(init_from: str) -> tuple[Config, Checkpoints]:
    """The resolved config and the checkpoints of the run, or saved model, in a folder.

    Raises:
      UserError: it holds no checkpoint, or its config.json is missing or damaged.
    """
    folder = epath.Path(init_from).expanduser()
    empty = f"--init_from={init_from} holds no checkpoint: name another run's workdir."
    if not (folder / "checkpoints").is_dir():
        raise UserError(empty)
    config, checkpoints = open_folder(folder, f"--init_from={init_from}")
    if not checkpoints.steps():
        checkpoints.close()
        raise UserError(empty)
    return config, checkpoints


def check_origin(config: Config, init_from: str) -> list[str]:
    """Compares a resolved config with that of the run whose weights it begins with.

    A run may begin with another router than that run's: its parameters are then those of the
    other one, where the shapes agree, and its state starts anew.

    Returns:
      A line for the log for each key that has another value.

    Raises:
      UserError: as `open_origin`, or the weights would compute another function.
    """
    origin, checkpoints = open_origin(init_from)
    checkpoints.close()
    refused = _other_function(origin, config)
    if refused:
        raise UserError(
            f"--init_from={init_from}: {sentence(refused, 'there')}, which makes its weights "
            f"compute something else: use that."
        )
    return lines(changes(origin, config), origin, config)


def _other_function(origin: Config, config: Config) -> list[Change]:
    here, there = config.model.moe, origin.model.moe
    if here.router != there.router:
        moe = dataclasses.replace(there, router=here.router, top_k=here.top_k)
        origin = dataclasses.replace(origin, model=dataclasses.replace(origin.model, moe=moe))
    return of_kind(changes(origin, config), (Decides.WEIGHTS,))
