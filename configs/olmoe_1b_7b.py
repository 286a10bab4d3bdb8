"""OLMoE 1B-7B: 64 small experts, eight per token, in every layer.

Paper: OLMoE, https://arxiv.org/abs/2409.02060.  Dropless, weights not renormalised, q/k norm over
  the whole projection, balance 0.01, z-loss 0.001, AdamW 4e-4, 4M tokens per step, 5.1T tokens.
  Weight decay 0.1 on all parameters: the paper found it best to decay RMSNorms and embeddings too.
Cost: 6.92B parameters, 1.28B active; the paper used 256 H100 for 10 days.
Expected: the loss curves in the paper's appendix, on its data mix; not yet reproduced by us.
Command: python -m moe_jax train --config=configs/olmoe_1b_7b.py --workdir=runs/olmoe
  --config.data.source=jsonl --config.data.files='gs://BUCKET/*.jsonl'
  --config.data.tokenizer=tokenizer.json
"""

from ml_collections import ConfigDict

from moe_jax.config import default_config


def get_config(arg: str = "") -> ConfigDict:
    del arg
    config = default_config()
    config.precision = "bfloat16"
    config.mesh.expert = 8
    model, moe = config.model, config.model.moe
    model.vocab_size = 50304
    model.num_layers, model.width = 16, 2048
    model.num_heads, model.num_kv_heads, model.head_dim = 16, 16, 128
    model.qk_norm = "full"
    model.scan_layers, model.remat = True, "save_dispatch"
    moe.num_experts, moe.top_k, moe.expert_width = 64, 8, 1024
    moe.options.top_k.renormalize = False
    moe.dispatch = "dropless"
    # As in the paper's code (MegaBlocks), the mean over layers, divided by K.
    moe.balance_layers, moe.balance_weight, moe.z_weight = "mean", 0.01, 0.001

    config.data.sequence_length = 4096
    config.train.steps, config.train.batch_size = 1_200_000, 1024
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 4e-4, 2000
    config.optimizer.decay_of.norm = 1.0
    config.eval.rows = 16_384
    return config
