"""What a run says before its first step about settings that depend on one another."""

import pytest
from small_run import small_config

from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.errors import UserError
from moe_jax.run.samples import check_samples


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
        assert f"eval.sample_tokens {tokens}: samples end after {left}," in lines[0]


@pytest.mark.parametrize("size", [32, 33, 500])
def test_a_prompt_without_room_for_text_is_refused(size):
    with pytest.raises(UserError, match=rf"sample_prompt has {size} tokens, .* \(32\): shorten it"):
        check_samples(sampling("p" * size, 1))
    assert check_samples(sampling("p" * size, 1, **{"eval.samples": 0})) == []
    assert len(load_tokenizer("bytes").encode("p" * size)) == size
