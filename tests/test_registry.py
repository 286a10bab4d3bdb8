"""Suggestions for config keys that do not exist."""

import pytest

from moe_jax.config import default_config
from moe_jax.registry import dotted_keys, suggest_key

KEYS = list(dotted_keys(default_config().to_dict()))


@pytest.mark.parametrize(
    ("typed", "first"),
    [
        ("learning_rate", "optimizer.learning_rate"),
        ("train.learning_rate", "optimizer.learning_rate"),
        ("lr", "optimizer.learning_rate"),
        ("optimizer.learning-rate", "optimizer.learning_rate"),
        ("num_experts", "model.moe.num_experts"),
        ("model.num_experts", "model.moe.num_experts"),
        ("num_local_experts", "model.moe.num_experts"),
        ("steps", "train.steps"),
        ("total_steps", "train.steps"),
        ("trian.steps", "train.steps"),
        ("train.stepz", "train.steps"),
        ("global_batch_size", "train.batch_size"),
        ("seq_length", "data.sequence_length"),
        ("n_heads", "model.num_heads"),
        ("warmup", "optimizer.warmup_steps"),
        ("vocab", "model.vocab_size"),
        ("clip", "optimizer.clip_norm"),
        ("cf", "model.moe.capacity_factor"),
        ("trian", "train"),
        ("gshard.jitter", "model.moe.options.gshard.jitter"),
    ],
)
def test_a_key_is_found_in_any_group(typed, first):
    assert suggest_key(typed, KEYS).startswith(f" (did you mean {first!r}")


@pytest.mark.parametrize("typed", ["checkpoint_every", "checkpoint.every", "train.checkpoint_evry"])
def test_keys_that_are_equally_near_are_all_named(typed):
    hint = suggest_key(typed, KEYS)
    assert "'checkpoint.every_steps'" in hint and "'checkpoint.every_minutes'" in hint


@pytest.mark.parametrize(
    ("typed", "listed"),
    [("zzzz", "optimizer, precision"), ("mesh.zzzz", "(known: data, expert, fsdp, tensor)")],
)
def test_where_nothing_is_near_the_keys_of_the_group_are_listed(typed, listed):
    assert listed in suggest_key(typed, KEYS)


def test_no_hint_of_no_keys():
    assert suggest_key("a.b", []) == " (known: )"
