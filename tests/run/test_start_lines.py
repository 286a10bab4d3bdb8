"""Start-up lines about settings that depend on each other."""

import pytest
from small_run import small_config

from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.errors import UserError
from moe_jax.run.resolve import describe, resolve
from moe_jax.run.samples import check_samples


def balance_lines(**overrides):
    config = small_config("", **{"train.batch_size": 64, "mesh.data": 1} | overrides)
    found = resolve(config, 1, 258)
    return [line for line in describe(found.config, found.components) if "balance loss" in line]


@pytest.mark.parametrize(("accumulation", "rows"), [(1, 64), (4, 16), (64, 1)])
def test_a_global_balance_loss_says_over_how_many_rows_it_is(accumulation, rows):
    overrides = {"train.accumulation": accumulation}
    (line,) = balance_lines(**overrides | {"model.moe.balance_scope": "global"})
    assert f"over {rows} rows (" in line
    assert (f"one of the {accumulation} microbatches" in line) == (accumulation > 1)
    assert not balance_lines(**overrides)  # groups are never split between microbatches
    unused = {"model.moe.balance_scope": "global", "model.moe.balance_weight": 0.0}
    assert not balance_lines(**overrides | unused)


@pytest.mark.parametrize("dense", [False, True])
def test_groups_with_factors_of_their_own_are_said(dense):
    values = {"optimizer.rate_of.router": 0.1, "optimizer.decay_of.norm": 1.0, "model.dense": dense}

    def lines(values):
        found = resolve(small_config("", **values), 1, 258)
        return [line for line in describe(found.config, found.components) if "by group" in line]

    assert lines(values) == [
        "learning rate by group: router 0.0003 (0.1 times 0.003)",
        "weight decay by group: norm 0.1 (1 times 0.1)",
    ]
    assert lines({"model.dense": dense}) == []


def sampling(prompt, tokens, length=32, **overrides):
    values = {
        "eval.sample_prompt": prompt,
        "eval.sample_tokens": tokens,
        "data.sequence_length": length,
    }
    return small_config("", **values | overrides)


@pytest.mark.parametrize(
    ("prompt", "tokens", "left"),
    [("abcd", 28, None), ("abcd", 29, 28), ("é" * 15, 3, 2), ("", 32, 31), ("a" * 31, 200, 1)],
)
def test_samples_end_with_the_trained_positions(prompt, tokens, left):
    lines = check_samples(sampling(prompt, tokens))
    assert len(lines) == (left is not None)
    if lines:
        assert f"eval.sample_tokens {tokens}: samples end after {left} tokens," in lines[0]


@pytest.mark.parametrize("size", [32, 33, 500])
def test_a_prompt_without_room_for_text_is_refused(size):
    with pytest.raises(UserError, match=rf"sample_prompt has {size} tokens .* \(32\): shorten it"):
        check_samples(sampling("p" * size, 1))
    assert check_samples(sampling("p" * size, 1, **{"eval.samples": 0})) == []
    assert len(load_tokenizer("bytes").encode("p" * size)) == size
