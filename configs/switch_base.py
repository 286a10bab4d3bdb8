"""Switch-Base shapes as a causal language model: 128 experts, one per token, every other layer.

Paper: Switch Transformers, https://arxiv.org/abs/2101.03961, where it is an encoder-decoder.
Cost: 3.71B parameters, 110M active; 2^20 tokens per step.  One 8-GPU node.
Expected: fewer steps to the same loss than a dense model of equal FLOPs, as in the paper.  Its
  figures are not comparable, because the model and the data differ.
Command: python -m moe_jax train --config=configs/switch_base.py --workdir=runs/switch_base
  --config.data.source=text --config.data.files='gs://BUCKET/*.txt'
  --config.data.tokenizer=tokenizer.json --config.mesh.expert=8
"""

from ml_collections import ConfigDict

from moe_jax.config import default_config


def get_config(arg: str = "") -> ConfigDict:
    del arg
    config = default_config()
    config.precision = "bfloat16"
    model, moe = config.model, config.model.moe
    model.vocab_size = 32128  # T5's, padded to a multiple of 128
    model.num_layers, model.width, model.ffn_width = 12, 768, 3072
    model.num_heads, model.num_kv_heads, model.head_dim = 12, 12, 64
    model.activation = "gelu"
    model.tied_head = True
    model.scan_layers, model.remat = True, "save_dispatch"
    moe.num_experts, moe.top_k, moe.expert_width, moe.every = 128, 1, 3072, 2
    moe.router = "switch"
    moe.options.switch.jitter = 0.01
    moe.capacity_factor, moe.eval_capacity_factor = 1.25, 2.0
    # Equation 4 of the paper, added once per MoE layer, with its alpha of 0.01.
    moe.balance_layers, moe.balance_weight, moe.z_weight = "sum", 0.01, 0.0

    config.data.sequence_length = 512
    config.train.steps, config.train.batch_size = 100_000, 2048
    config.optimizer.name, config.optimizer.schedule = "adafactor", "inverse_sqrt"
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 0.01, 10_000
    config.optimizer.weight_decay = 0.0
    config.eval.rows = 32_768
    return config
