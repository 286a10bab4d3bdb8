"""What does not change during a run, and what its parts take from the config."""

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from moe_jax.checkpoint import Checkpoints
from moe_jax.config import Config
from moe_jax.data.pipeline import Batches, HeldOut, Supply
from moe_jax.data.store import Store
from moe_jax.files.workdir import Folder
from moe_jax.model.define import ModelDef
from moe_jax.train.optim import Optimizer
from moe_jax.train.step import StepOptions

Say = Callable[[str], None]


def make_optimizer(config: Config, model: ModelDef) -> Optimizer:
    """The optimizer of a config, which leaves a frozen router's parameters alone.

    Raises:
      UserError: one that cannot be applied to the model's parameters.
    """
    frozen = ("router",) if config.model.moe.freeze_router else ()
    optimizer = Optimizer(config.optimizer, config.train.steps, frozen=frozen)
    jax.eval_shape(lambda params: optimizer.init(params, model.rules), model.abstract)
    return optimizer


def make_step_options(config: Config, num_sources: int = 1) -> StepOptions:
    """What the train step takes from a resolved config."""
    return StepOptions(
        seed=config.seed,
        clip_norm=config.optimizer.clip_norm,
        spike_factor=config.train.spike_factor,
        num_sources=num_sources,
        debug=config.train.debug,
    )


def microbatch_of(config: Config) -> tuple[int, int, int]:
    """(accumulation, rows, T) of a global batch."""
    train = config.train
    return train.accumulation, train.batch_size // train.accumulation, config.data.sequence_length


@dataclasses.dataclass(frozen=True)
class Run:
    """What does not change during a run."""

    config: Config
    workdir: Folder
    mesh: Mesh
    model: ModelDef
    optimizer: Optimizer
    store: Store
    batches: Batches
    supply: Supply | None  # of steps of the data, under data.max_epochs; None: for ever
    heldout: HeldOut
    checkpoints: Checkpoints

    @property
    def microbatch(self) -> tuple[int, int, int]:
        """(accumulation, rows, T) of a global batch."""
        return microbatch_of(self.config)

    @property
    def step_options(self) -> StepOptions:
        """What the train step takes from the config."""
        return make_step_options(self.config, len(self.store.sources))
