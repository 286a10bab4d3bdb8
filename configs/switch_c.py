"""Switch-C shapes: 2048 experts, one per token, in every layer; 1.6T parameters.

Paper: Switch Transformers, https://arxiv.org/abs/2101.03961, table 9.  Here it is a causal model of
  30 layers with experts in each; the paper's is an encoder-decoder.
Cost: 1.571T parameters, 1.47B active; 2^20 tokens per step.  Parameters, gradients and
  Adafactor's factored moments in float32 need 13 TB: a v5p-512 slice or larger.
Expected: nothing to reproduce; the config serves to plan and to compile ahead of time.
Command: python -m moe_jax train --config=configs/switch_c.py --workdir=runs/switch_c
  --config.data.source=text --config.data.files='gs://BUCKET/*.txt'
  --config.data.tokenizer=tokenizer.json --config.mesh.expert=256
"""

from ml_collections import ConfigDict

from moe_jax.config import default_config


def get_config(arg: str = "") -> ConfigDict:
    del arg
    config = default_config()
    config.precision = "bfloat16"
    model, moe = config.model, config.model.moe
    model.vocab_size = 32128  # T5's, padded to a multiple of 128
    model.num_layers, model.width, model.ffn_width = 30, 2080, 6144
    model.num_heads, model.num_kv_heads, model.head_dim = 32, 32, 64
    model.activation = "gelu"
    model.tied_head = True
    model.scan_layers, model.remat = True, "full"
    moe.num_experts, moe.top_k, moe.expert_width, moe.every = 2048, 1, 6144, 1
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
