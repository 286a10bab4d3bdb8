"""moe_jax: sparse mixture-of-experts pretraining in JAX and Flax.

Names are imported when they are first used: a launcher imports `moe_jax.errors` on machines that
may hold no JAX at all.
"""

import importlib
from typing import TYPE_CHECKING, Any

from moe_jax.version import __version__ as __version__

if TYPE_CHECKING:
    from moe_jax.errors import UserError as UserError
    from moe_jax.parallel.mesh import MeshConfig as MeshConfig
    from moe_jax.parallel.mesh import make_mesh as make_mesh
    from moe_jax.pretrained.load import load as load
    from moe_jax.pretrained.loaded_model import LoadedModel as LoadedModel

# Public name -> the module that it comes from.
_EXPORTS = {
    "LoadedModel": "moe_jax.pretrained.loaded_model",
    "MeshConfig": "moe_jax.parallel.mesh",
    "UserError": "moe_jax.errors",
    "load": "moe_jax.pretrained.load",
    "make_mesh": "moe_jax.parallel.mesh",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'moe_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
