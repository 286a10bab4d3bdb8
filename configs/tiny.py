"""Tiny: the first run.  Sparse by default, `configs/tiny.py:dense` for its dense twin.

Paper: none; a byte-level model of 4 layers, 8 experts of width 256, two per token.
Cost: 7.5M parameters (2.8M active), 200 steps of 4,096 bytes: under 3 minutes on 2 CPU cores.
Expected: held-out loss under 1.75 nats per byte on the `stdlib` corpus.
Command: python -m moe_jax train --config=configs/tiny.py --workdir=runs/tiny

`dense` replaces the experts by one FFN of the same FLOPs per token.
"""

from ml_collections import ConfigDict

from moe_jax.config import default_config
from moe_jax.errors import UserError


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "dense"):
        raise UserError(f"configs/tiny.py takes the argument 'dense' or none, not {arg!r}.")
    config = default_config()
    model, moe = config.model, config.model.moe
    model.num_layers, model.width = 4, 256
    model.num_heads, model.num_kv_heads, model.head_dim = 4, 4, 64
    moe.num_experts, moe.top_k, moe.expert_width = 8, 2, 256
    model.ffn_width = moe.top_k * moe.expert_width
    model.dense = arg == "dense"

    # One row per routing group: the groups are the same on every mesh, as long as batch shards x
    # accumulation is at most 32.
    moe.group_rows = 1
    config.data.sequence_length = 128
    config.train.steps, config.train.batch_size = 200, 32
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 20
    config.checkpoint.every_steps = 100
    config.eval.every = 100
    config.eval.sample_tokens = 120  # prompt and sample must fit in one row
    return config
