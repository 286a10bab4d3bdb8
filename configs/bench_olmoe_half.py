"""GPU benchmark with many small experts: OLMoE with half its layers, a size for one H200.

Paper: shapes after OLMoE, https://arxiv.org/abs/2409.02060.
Cost: 3.56B parameters, 744M active; 4 rows of 4096 tokens per step on one 141 GB GPU.
Expected: on one H200, jax 0.11.2: 163 ms per step, 426 TFLOP/s; with 16 rows 564 ms, 493 TFLOP/s.
Command: python -m moe_jax bench --config=configs/bench_olmoe_half.py --steps=20
  --config.model.moe.dispatch=dropless
"""

from ml_collections import ConfigDict

from moe_jax.config import default_config


def get_config(arg: str = "") -> ConfigDict:
    del arg
    config = default_config()
    config.precision = "bfloat16"
    model, moe = config.model, config.model.moe
    model.vocab_size = 50304
    model.num_layers, model.width = 8, 2048
    model.num_heads, model.num_kv_heads, model.head_dim = 16, 16, 128
    model.qk_norm = "full"
    moe.num_experts, moe.top_k, moe.expert_width = 64, 8, 1024
    moe.options.top_k.renormalize = False

    config.data.sequence_length = 4096
    config.train.batch_size = 4
    config.eval.rows = 64
    return config
