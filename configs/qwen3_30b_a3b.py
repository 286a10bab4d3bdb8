"""Qwen3-30B-A3B: 128 small experts, eight per token, in every layer.

Paper: Qwen3 Technical Report, https://arxiv.org/abs/2505.09388: q/k norm by head, renormalised
  weights, no shared expert, balance loss over the global batch.  The recipe below is ours.
Cost: 30.5B parameters, 3.35B active; 2^22 tokens per step.  Weights, gradients and Adam's moments
  in float32 need 490 GB.  Mesh axis `fsdp` takes the devices that `expert` leaves; use enough of
  them that a device holds one or two rows (not yet run).  Do not use train.accumulation instead:
  the balance loss would be over a microbatch, in the paper it is over the global batch.
Expected: no published loss; the released weights are the reference for the architecture.
Command: python -m moe_jax train --config=configs/qwen3_30b_a3b.py --workdir=runs/qwen3
  --config.data.source=parquet --config.data.files='gs://BUCKET/*.parquet'
  --config.data.tokenizer=tokenizer.json
"""

from ml_collections import ConfigDict

from moe_jax.config import default_config


def get_config(arg: str = "") -> ConfigDict:
    del arg
    config = default_config()
    config.precision = "bfloat16"
    config.mesh.expert = 8
    config.mesh.data, config.mesh.fsdp = 1, -1
    model, moe = config.model, config.model.moe
    model.vocab_size = 151_936
    model.num_layers, model.width = 48, 2048
    model.num_heads, model.num_kv_heads, model.head_dim = 32, 4, 128
    model.qk_norm = "head"
    model.rope_theta, model.norm_eps = 1e6, 1e-6
    model.scan_layers, model.remat = True, "full"
    moe.num_experts, moe.top_k, moe.expert_width = 128, 8, 768
    moe.options.top_k.renormalize = True
    moe.dispatch = "dropless"
    # The paper gives neither the weight nor the sum over layers; 0.001 with the mean is ours.
    moe.balance_weight, moe.balance_scope, moe.z_weight = 0.001, "global", 0.0

    config.data.sequence_length = 4096
    config.train.steps, config.train.batch_size = 250_000, 1024
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 3e-4, 2000
    config.eval.rows = 16_384
    return config
