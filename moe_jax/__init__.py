"""moe_jax: sparse mixture-of-experts pretraining in JAX and Flax."""

from moe_jax.version import __version__ as __version__
