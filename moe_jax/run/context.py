"""`Run`, the parts of a run that do not change, and the optimizer and step options it needs."""

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from moe_jax.checkpoint import Checkpoints
from moe_jax.config import Config
from moe_jax.data.pipeline import Batches, DataLimit, HeldOut
from moe_jax.data.store import Store
from moe_jax.files.workdir import Folder
from moe_jax.model.define import ModelDef
from moe_jax.train.optim import Optimizer
from moe_jax.train.step import StepOptions

Say = Callable[[str], None]


def make_optimizer(config: Config, model: ModelDef) -> Optimizer:
    """Make the optimizer of a config; it does not update the parameters of a frozen router.

    Raises:
      UserError: the optimizer cannot be applied to the model's parameters.
    """
    frozen = ("router",) if config.model.moe.freeze_router else ()
    optimizer = Optimizer(config.optimizer, config.train.steps, frozen=frozen)
    jax.eval_shape(lambda params: optimizer.init(params, model.rules), model.abstract)
    return optimizer


def make_step_options(config: Config, num_sources: int = 1) -> StepOptions:
    """The settings of a resolved config that the train step needs."""
    return StepOptions(
        seed=config.seed,
        clip_norm=config.optimizer.clip_norm,
        spike_factor=config.train.spike_factor,
        num_sources=num_sources,
        debug=config.train.debug,
    )


def microbatch_of(config: Config) -> tuple[int, int, int]:
    """The shape (microbatches, rows per microbatch, T) of a global batch."""
    train = config.train
    return train.accumulation, train.batch_size // train.accumulation, config.data.sequence_length


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run that do not change during it."""

    config: Config
    workdir: Folder
    mesh: Mesh
    model: ModelDef
    optimizer: Optimizer
    store: Store
    batches: Batches
    supply: DataLimit | None  # batches available under data.max_epochs; None: no limit
    heldout: HeldOut
    checkpoints: Checkpoints

    @property
    def microbatch(self) -> tuple[int, int, int]:
        """The shape (microbatches, rows per microbatch, T) of a global batch."""
        return microbatch_of(self.config)

    @property
    def step_options(self) -> StepOptions:
        """The settings of the config that the train step needs."""
        return make_step_options(self.config, len(self.store.sources))
