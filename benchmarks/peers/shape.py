"""Converts a config to the equal Hugging Face model: prints one line of JSON, without torch.

    python -m benchmarks.peers.shape --config=configs/bench_mixtral_2b.py [--config.KEY=VALUE]

A config with a feature that the peer's models lack is refused, so that both sides always train the
same model.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from moe_jax.cli.commands import Command
from moe_jax.cli.exit import run
from moe_jax.cli.parse import parse
from moe_jax.config import Config, from_config_dict
from moe_jax.data.tokenizers import config_tokenizer
from moe_jax.errors import UserError
from moe_jax.model.config import ModelConfig
from moe_jax.model.define import define
from moe_jax.model.flops import flops_per_token, param_counts
from moe_jax.moe.components import make_router


def main(argv: Sequence[str]) -> int:
    config = from_config_dict(parse(argv, Command("", workdir=False)).config)
    print(json.dumps(peer_shape(config)))
    return 0


def peer_shape(config: Config) -> dict[str, Any]:
    """Make the input of hf_step.py: the peer's model and optimizer, and our count of its FLOPs.

    Raises:
      UserError: the config has a feature that the peer's models lack.
    """
    vocabulary = config.model.vocab_size or config_tokenizer(config.data).vocab_size
    model = dataclasses.replace(config.model, vocab_size=vocabulary)
    length = config.data.sequence_length
    for key, value, wanted in _demands(model):
        if value != wanted:
            raise UserError(
                f"config.model.{key} is {value!r}: the peer's models do not have it. Set "
                f"{wanted!r}."
            )
    optimizer, defined = config.optimizer, define(model, config.precision)
    return {
        "class": "Olmoe" if model.qk_norm == "full" else "Mixtral",
        "model": _arguments(model, length),
        "dtype": config.precision,
        "sequence_length": length,
        "flops_per_token": flops_per_token(defined, length),
        "params": param_counts(defined).total,
        "optimizer": {
            "lr": optimizer.learning_rate,
            "betas": [optimizer.b1, optimizer.b2],
            "eps": optimizer.eps,
            "weight_decay": optimizer.weight_decay,
        },
    }


def _demands(model: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    """List (key, value, the only value that the peer's models support)."""
    yield from (
        ("dense", model.dense, False),
        ("activation", model.activation, "swiglu"),
        ("confine_attention", model.confine_attention, False),
        ("moe.router", model.moe.router, "top_k"),
        ("moe.every", model.moe.every, 1),
        ("moe.first_dense", model.moe.first_dense, 0),
        ("moe.shared_experts", model.moe.shared_experts, 0),
    )
    renormalize = make_router(model.moe).renormalize
    if model.qk_norm == "full":
        yield "head_dim", model.head_dim, model.width // model.num_heads
    else:
        yield "qk_norm", model.qk_norm, "none"
        yield "moe.options.top_k.renormalize", renormalize, True


def _arguments(model: ModelConfig, length: int) -> dict[str, Any]:
    """The arguments of the peer's configuration class."""
    moe = model.moe
    shared = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": moe.expert_width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "num_experts_per_tok": moe.top_k,
        "max_position_embeddings": length,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "tie_word_embeddings": model.tied_head,
        "output_router_logits": True,  # adds the balance loss
        "router_aux_loss_coef": moe.balance_weight,
        "use_cache": False,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if model.qk_norm == "full":
        renormalize = make_router(moe).renormalize
        return shared | {"num_experts": moe.num_experts, "norm_topk_prob": renormalize}
    return shared | {"num_local_experts": moe.num_experts, "head_dim": model.head_dim}


if __name__ == "__main__":
    run(main)
