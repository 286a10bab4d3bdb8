"""Mixtral 8x7B: 8 large experts, two per token, in every layer.

Paper: Mixtral of Experts, https://arxiv.org/abs/2401.04088.  Shapes and router as released.  The
  training recipe was not published; the one below is ours.
Cost: 46.7B parameters, 12.9B active; 2^22 tokens per step.  Weights, gradients and Adam's moments
  in float32 need 750 GB.  Mesh axis `fsdp` takes the devices that `expert` leaves.  With few
  devices, set train.accumulation so that a device holds one or two rows at a time (not yet run).
Expected: no published loss; the released weights are the reference for the architecture.
Command: python -m moe_jax train --config=configs/mixtral_8x7b.py --workdir=runs/mixtral
  --config.data.source=parquet --config.data.files='gs://BUCKET/*.parquet'
  --config.data.tokenizer=tokenizer.model
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
    model.vocab_size = 32_000
    model.num_layers, model.width = 32, 4096
    model.num_heads, model.num_kv_heads, model.head_dim = 32, 8, 128
    model.rope_theta = 1e6
    model.scan_layers, model.remat = True, "full"
    moe.num_experts, moe.top_k, moe.expert_width = 8, 2, 14336
    moe.options.top_k.renormalize = True
    moe.dispatch = "dropless"
    # router_aux_loss_coef 0.02 of the released configuration, whose loss pools the layers and does
    # not divide by K: K times that coefficient here.
    moe.balance_layers, moe.balance_weight, moe.z_weight = "pooled", 2 * 0.02, 0.001

    config.data.sequence_length = 4096
    config.train.steps, config.train.batch_size = 250_000, 1024
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 3e-4, 2000
    config.eval.rows = 16_384
    return config
