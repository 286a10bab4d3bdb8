"""`--init_from`: opens and checks the run, or saved model, whose weights a new run starts from."""

import dataclasses

from etils import epath

from moe_jax.checkpoint import Checkpoints
from moe_jax.config import Config
from moe_jax.decides import Decides
from moe_jax.errors import UserError
from moe_jax.pretrained.folder import open_folder
from moe_jax.run.changes import Change, changes, lines, of_kind, sentence


def open_origin(init_from: str) -> tuple[Config, Checkpoints]:
    """Open a workdir or saved model: its resolved config and its checkpoints.

    Raises:
      UserError: the folder holds no checkpoint, or its config.json is missing or damaged.
    """
    folder = epath.Path(init_from).expanduser()
    empty = (
        f"--init_from={init_from} holds no checkpoint: name the workdir of a run that saved one."
    )
    if not (folder / "checkpoints").is_dir():
        raise UserError(empty)
    config, checkpoints = open_folder(folder, f"--init_from={init_from}")
    if not checkpoints.steps():
        checkpoints.close()
        raise UserError(empty)
    return config, checkpoints


def check_origin(config: Config, init_from: str) -> list[str]:
    """Compare a resolved config with that of the run whose weights it starts from.

    The new run may have a different router.  It then takes the router parameters of the old run if
    the shapes agree, and its router state is reset.

    Returns:
      A log line for each key that differs.

    Raises:
      UserError: as `open_origin`, or the weights would compute a different function.
    """
    origin, checkpoints = open_origin(init_from)
    checkpoints.close()
    refused = _other_function(origin, config)
    if refused:
        raise UserError(
            f"--init_from={init_from}: {sentence(refused, 'there')}, so that its weights would "
            f"compute a different function. Set the values of that run."
        )
    return lines(changes(origin, config), origin, config)


def _other_function(origin: Config, config: Config) -> list[Change]:
    here, there = config.model.moe, origin.model.moe
    if here.router != there.router:
        moe = dataclasses.replace(there, router=here.router, top_k=here.top_k)
        origin = dataclasses.replace(origin, model=dataclasses.replace(origin.model, moe=moe))
    return of_kind(changes(origin, config), (Decides.WEIGHTS,))
