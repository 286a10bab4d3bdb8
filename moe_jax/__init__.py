"""moe_jax: sparse mixtures of experts in JAX and Flax, from data to trained model.

docs/library.md shows each name in use.  Names are imported on first use: `import moe_jax` imports
neither JAX nor Flax, so launchers run on machines without them.
"""

import importlib
from typing import TYPE_CHECKING, Any

from moe_jax.errors import UserError
from moe_jax.version import __version__

if TYPE_CHECKING:
    from moe_jax import data, ops
    from moe_jax.config import Config
    from moe_jax.config_file import load_config
    from moe_jax.data.config import DataConfig
    from moe_jax.model.config import ModelConfig
    from moe_jax.model.define import define
    from moe_jax.model.forward import forward
    from moe_jax.model.initialize import init
    from moe_jax.model.transformer import Transformer
    from moe_jax.moe.balance import aux_loss
    from moe_jax.moe.components import init_router_state, make_dispatch, make_router
    from moe_jax.moe.config import MoEConfig
    from moe_jax.moe.dispatch import DISPATCH
    from moe_jax.moe.layer import MoE
    from moe_jax.moe.routers import ROUTERS
    from moe_jax.moe.routers.linear import LinearRouter
    from moe_jax.moe.study import study_router
    from moe_jax.moe.types import (
        Dispatch,
        ExpertChoice,
        MoEContext,
        Router,
        RouterIn,
        TokenChoice,
    )
    from moe_jax.parallel.mesh import MeshConfig, make_mesh
    from moe_jax.pretrained.load import load
    from moe_jax.pretrained.loaded_model import LoadedModel
    from moe_jax.train.optim import Optimizer, OptimizerConfig
    from moe_jax.train.state import TrainState, init_train_state
    from moe_jax.train.step import StepOptions, jit_train_step, make_train_step

# Module -> the names that it exports; None: the module itself is exported.
_EXPORTS: dict[str, tuple[str, ...] | None] = {
    "config": ("Config",),
    "config_file": ("load_config",),
    "data": None,
    "data.config": ("DataConfig",),
    "model.config": ("ModelConfig",),
    "model.define": ("define",),
    "model.forward": ("forward",),
    "model.initialize": ("init",),
    "model.transformer": ("Transformer",),
    "moe.balance": ("aux_loss",),
    "moe.components": ("init_router_state", "make_dispatch", "make_router"),
    "moe.config": ("MoEConfig",),
    "moe.dispatch": ("DISPATCH",),
    "moe.layer": ("MoE",),
    "moe.routers": ("ROUTERS",),
    "moe.routers.linear": ("LinearRouter",),
    "moe.study": ("study_router",),
    "moe.types": ("Dispatch", "ExpertChoice", "MoEContext", "Router", "RouterIn", "TokenChoice"),
    "ops": None,
    "parallel.mesh": ("MeshConfig", "make_mesh"),
    "pretrained.load": ("load",),
    "pretrained.loaded_model": ("LoadedModel",),
    "train.optim": ("Optimizer", "OptimizerConfig"),
    "train.state": ("TrainState", "init_train_state"),
    "train.step": ("StepOptions", "jit_train_step", "make_train_step"),
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names or (module,)}

__all__ = [
    "DISPATCH",
    "ROUTERS",
    "Config",
    "DataConfig",
    "Dispatch",
    "ExpertChoice",
    "LinearRouter",
    "LoadedModel",
    "MeshConfig",
    "MoE",
    "MoEConfig",
    "MoEContext",
    "ModelConfig",
    "Optimizer",
    "OptimizerConfig",
    "Router",
    "RouterIn",
    "StepOptions",
    "TokenChoice",
    "TrainState",
    "Transformer",
    "UserError",
    "__version__",
    "aux_loss",
    "data",
    "define",
    "forward",
    "init",
    "init_router_state",
    "init_train_state",
    "jit_train_step",
    "load",
    "load_config",
    "make_dispatch",
    "make_mesh",
    "make_router",
    "make_train_step",
    "ops",
    "study_router",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moe_jax' has no attribute {name!r}")
    module = importlib.import_module(f"moe_jax.{_HOME[name]}")
    return module if _EXPORTS[_HOME[name]] is None else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
