"""Samples of a run never extend beyond the positions that were trained."""

import jax
import pytest
from small_run import ONE_LAYER, small_config, write_corpus

from moe_jax.run import samples
from moe_jax.run.restore import restore_or_init_state
from moe_jax.run.setup import prepare


@pytest.mark.parametrize(
    ("asked", "positions"),
    [(5, 9), pytest.param(28, 32, marks=pytest.mark.lifecycle), (29, 32), (1000, 32)],
)
def test_prompt_and_text_fit_a_row(tmp_path, monkeypatch, asked, positions):
    overrides = {"eval.sample_prompt": "abcd", "eval.sample_tokens": asked, "mesh.data": 1}
    config = small_config(write_corpus(tmp_path / "text", 8), **ONE_LAYER | overrides)
    run = prepare(config, tmp_path / "run", lambda line: None, jax.devices()[:1])
    shapes = []
    make_sampler = samples.make_sampler

    def recording(*args, **kwargs):
        sample = make_sampler(*args, **kwargs)

        def recorded(params, router, tokens_BT, prompt):
            shapes.append(tokens_BT.shape)
            return sample(params, router, tokens_BT, prompt)

        return recorded

    monkeypatch.setattr(samples, "make_sampler", recording)
    texts = []
    state = restore_or_init_state(run, "", lambda line: None)
    samples.write_samples(run, state, 8, texts.append)
    assert shapes == [(1, positions)] and len(texts) == 1
    assert texts[0].partition("\n")[2].startswith("abcd")
