"""Where a run is shown on Weights & Biases, beside TensorBoard."""

import dataclasses

from moe_jax.decides import Run
from moe_jax.errors import UserError

MODES = ("online", "offline")


@dataclasses.dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases (extra `wandb`); it shows the rows that TensorBoard shows.

    Raises:
      UserError: an unknown mode.
    """

    project: Run[str] = ""  # empty: not used
    # online | offline: files for `wandb sync`, in WORKDIR/wandb; no network is used.
    mode: Run[str] = "online"
    name: Run[str] = ""  # of the run; empty: the last part of --workdir
    entity: Run[str] = ""  # user or team; empty: the account's default

    def __post_init__(self):
        if self.mode not in MODES:
            raise UserError(f"wandb.mode is {self.mode!r}: use one of {', '.join(MODES)}.")
