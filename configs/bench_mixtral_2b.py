"""GPU benchmark with few large experts: Mixtral's proportions at a size for one H200.

Paper: shapes after Mixtral of Experts, https://arxiv.org/abs/2401.04088.
Cost: 2.31B parameters, 723M active; 4 rows of 4096 tokens per step on one 141 GB GPU.
Expected: on one H200, jax 0.11.2: 142 ms per step, 489 TFLOP/s; with 16 rows 496 ms, 561 TFLOP/s.
Command: python -m moe_jax bench --config=configs/bench_mixtral_2b.py --steps=20
  --config.model.moe.dispatch=dropless
"""

from ml_collections import ConfigDict

from moe_jax.config import default_config


def get_config(arg: str = "") -> ConfigDict:
    del arg
    config = default_config()
    config.precision = "bfloat16"
    model, moe = config.model, config.model.moe
    model.vocab_size = 32_000
    model.num_layers, model.width = 6, 2048
    model.num_heads, model.num_kv_heads, model.head_dim = 16, 4, 128
    model.rope_theta = 1e6
    moe.num_experts, moe.top_k, moe.expert_width = 8, 2, 7168
    moe.options.top_k.renormalize = True

    config.data.sequence_length = 4096
    config.train.batch_size = 4
    config.eval.rows = 64
    return config
