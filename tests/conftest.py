"""Eight virtual CPU devices, a compilation cache, and shapes checked while the tests run."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from jaxtyping import install_import_hook

CACHE = pathlib.Path(__file__).parents[1] / ".cache" / "jax"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
install_import_hook("moe_jax", "beartype.beartype")
