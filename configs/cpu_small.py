"""The CPU benchmark: `:8`, `:32`, `:128` experts of equal active FLOPs, or `:dense`.

Paper: none; 4 layers of width 256, top-2 experts of width 512, 8 rows of 256 bytes, float32.
Cost: 14M, 52M, 203M parameters, 4.3M to 4.5M active: 56 GFLOP per step for any E.
Expected: docs/cpu.md has step times beside other frameworks on the same workload.
Command: python -m moe_jax bench --config=configs/cpu_small.py:8 --steps=20
"""

from ml_collections import ConfigDict

from moe_jax.config import default_config
from moe_jax.errors import UserError


def get_config(arg: str = "8") -> ConfigDict:
    if arg not in ("8", "32", "128", "dense"):
        raise UserError(f"configs/cpu_small.py takes 8, 32, 128 or dense, not {arg!r}.")
    config = default_config()
    model, moe = config.model, config.model.moe
    model.num_layers, model.width = 4, 256
    model.num_heads, model.num_kv_heads, model.head_dim = 4, 4, 64
    model.dense, model.ffn_width = arg == "dense", 1024
    moe.num_experts = 8 if arg == "dense" else int(arg)
    moe.top_k, moe.expert_width = 2, 512
    moe.balance_weight, moe.z_weight = (
        0.0,
        0.0,
    )  # the other frameworks train without auxiliary losses

    config.data.sequence_length = 256
    config.train.batch_size = 8
    config.optimizer.schedule = "constant"
    config.optimizer.learning_rate = 1e-3
    config.eval.rows = 128
    return config
