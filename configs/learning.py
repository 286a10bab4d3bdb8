"""Learning: does sparse learn more than dense at equal FLOPs per token?  docs/learning.md answers.

Paper: none; 8 layers of width 512 with 2,048 active hidden units per token, rows of 1,024 tokens.
Cost: 278M FLOPs per token for every argument, the router not counted; 1,000 steps of 65,536 tokens
  take about a minute on one H200.  50M parameters (dense) to 1.6B (e64k1).
Expected: held-out loss on the corpus of benchmarks/corpus in docs/learning.md.
Command: python -m moe_jax train --config=configs/learning.py:e64k2 --workdir=runs/e64k2

The argument is `dense`, or `eEkK` for E experts of which each token uses K, of width 2048 / K.
"""

import re

from ml_collections import ConfigDict

from moe_jax.config import default_config
from moe_jax.errors import UserError

ACTIVE_WIDTH = 2048  # hidden units per token


def get_config(arg: str = "e64k2") -> ConfigDict:
    named = re.fullmatch(r"e([1-9]\d*)k([1-9]\d*)", arg or "e64k2")
    if named is None and arg != "dense":
        raise UserError(f"configs/learning.py takes dense or eEkK such as e64k2, not {arg!r}.")
    config = default_config()
    config.precision = "bfloat16"
    model, moe = config.model, config.model.moe
    model.vocab_size = 16_384
    model.num_layers, model.width, model.ffn_width = 8, 512, ACTIVE_WIDTH
    model.num_heads, model.num_kv_heads, model.head_dim = 8, 8, 64
    model.scan_layers = True
    model.dense = named is None
    if named is not None:
        moe.num_experts, moe.top_k = int(named[1]), int(named[2])
        moe.expert_width = ACTIVE_WIDTH // moe.top_k
    # The bias balances; the loss of DeepSeek-V3 keeps single rows from using few experts.
    moe.router, moe.dispatch = "sigmoid_bias", "dropless"
    moe.balance_scope, moe.balance_weight = "row", 1e-4
    moe.options.sigmoid_bias.renormalize = moe.top_k > 1

    data = config.data
    data.source, data.files, data.field = "parquet", "corpus/*.parquet", "text"
    data.tokenizer, data.sequence_length = "corpus/tokenizer.json", 1024
    config.train.steps, config.train.batch_size = 1000, 64
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e-3, 100
    config.eval.every, config.eval.rows, config.eval.samples = 250, 512, 0
    config.checkpoint.every_steps, config.checkpoint.keep_last = 0, 1
    return config
