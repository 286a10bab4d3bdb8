"""moe_jax: sparse mixture-of-experts pretraining in JAX and Flax."""

__version__ = "0.1.0"
