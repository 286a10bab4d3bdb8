"""Numerical operations; each has a plain reference and fast paths."""

from moe_jax.ops.attention import attention
from moe_jax.ops.cross_entropy import cross_entropy, token_nll
from moe_jax.ops.float8 import float8_grouped_matmul
from moe_jax.ops.float32_matmul import float32_matmul
from moe_jax.ops.grouped_matmul import grouped_matmul

__all__ = [
    "attention",
    "cross_entropy",
    "float8_grouped_matmul",
    "float32_matmul",
    "grouped_matmul",
    "token_nll",
]
