"""GShard's experts in a causal language model: 128 experts, two per token, every other layer.

Paper: GShard, https://arxiv.org/abs/2006.16668.  These are its shapes of 12 layers and 128 experts;
  the 600B model has 36 layers and 2048 experts.  The second expert is sampled by its weight.
Cost: 13.2B parameters, 469M active; 2^20 tokens per step.  Four 8-GPU nodes.
Expected: no published figure is comparable, because the paper's task is machine translation.
Command: python -m moe_jax train --config=configs/gshard.py --workdir=runs/gshard
  --config.data.source=text --config.data.files='gs://BUCKET/*.txt'
  --config.data.tokenizer=tokenizer.json --config.mesh.expert=32
"""

from ml_collections import ConfigDict

from moe_jax.config import default_config


def get_config(arg: str = "") -> ConfigDict:
    del arg
    config = default_config()
    config.precision = "bfloat16"
    model, moe = config.model, config.model.moe
    model.vocab_size = 64_000
    model.num_layers, model.width, model.ffn_width = 12, 1024, 8192
    model.num_heads, model.num_kv_heads, model.head_dim = 16, 16, 128
    model.activation = "gelu"
    model.tied_head = True
    model.scan_layers, model.remat = True, "save_dispatch"
    moe.num_experts, moe.top_k, moe.expert_width, moe.every = 128, 2, 8192, 2
    moe.router = "gshard"
    moe.options.gshard.random_second = True
    moe.capacity_factor, moe.eval_capacity_factor = 2.0, 2.0
    # Like the paper's l_aux, added once per MoE layer; that is smaller by E^2 at the same load.
    moe.balance_layers, moe.balance_weight, moe.z_weight = "sum", 0.01, 0.0

    config.data.sequence_length = 1024
    config.train.steps, config.train.batch_size = 100_000, 1024
    config.optimizer.name, config.optimizer.schedule = "adafactor", "inverse_sqrt"
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 0.01, 10_000
    config.optimizer.weight_decay = 0.0
    config.eval.rows = 16_384
    return config
