"""Generates sample texts at the end of a run, for the user to read.

B texts, T positions.
"""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import Config
from moe_jax.data.tokenizers import Tokenizer, bos_ids, config_tokenizer
from moe_jax.errors import UserError
from moe_jax.eval.generate import make_sampler
from moe_jax.files import json_files
from moe_jax.files.workdir import Folder
from moe_jax.files.write_errors import cannot_write
from moe_jax.parallel.rules import sharding
from moe_jax.run.context import Run
from moe_jax.train.state import TrainState


def check_samples(config: Config) -> list[str]:
    """Check that the prompt fits, and make a start-up line if samples will be cut short.

    Positions beyond `data.sequence_length` are never trained, so prompt and sample share one row.

    Returns:
      The start-up line, if there is one.

    Raises:
      UserError: the prompt fills the row, or the tokenizer cannot be read.
    """
    if not config.eval.samples:
        return []
    length, asked = config.data.sequence_length, config.eval.sample_tokens
    prompt = len(_prompt(config, config_tokenizer(config.data)))
    if prompt >= length:
        raise UserError(
            f"config.eval.sample_prompt has {prompt} tokens and fills a row of "
            f"data.sequence_length ({length}): shorten it, or set eval.samples=0."
        )
    if prompt + asked <= length:
        return []
    return [
        f"eval.sample_tokens {asked}: samples end after {length - prompt} tokens, because prompt "
        f"({prompt} tokens) and sample share data.sequence_length {length}"
    ]


def write_samples(run: Run, state: TrainState, step: int, write: Callable[[str], None]) -> None:
    """Generate texts from `eval.sample_prompt` and pass each, decoded, to `write`.

    Args:
      run: the run that the state belongs to.
      state: holds the parameters that generate.
      step: named in the heading of each text.
      write: called once per text.
    """
    config = run.config.eval
    if not config.samples:
        return
    tokenizer = config_tokenizer(run.config.data)
    prompt = _prompt(run.config, tokenizer)
    length = min(len(prompt) + config.sample_tokens, run.config.data.sequence_length)
    shards = run.config.mesh.batch_shards
    rows = -(-config.samples // shards) * shards
    tokens_BT = np.full((rows, length), run.store.pad_id, np.int32)
    tokens_BT[:, : len(prompt)] = prompt
    sampler = make_sampler(
        run.model,
        run.mesh,
        seed=run.config.seed,
        temperature=config.temperature,
        vocab_size=run.store.vocab_size,
    )
    out = jax.jit(sampler, out_shardings=sharding(run.mesh, (None, None)))(
        state.params, state.router, tokens_BT, jnp.int32(len(prompt))
    )
    for number, ids in enumerate(np.asarray(out.addressable_data(0))[: config.samples], 1):
        text_ids = itertools.takewhile(lambda i: i != run.store.eos_id, ids[len(prompt) :].tolist())
        text = tokenizer.decode([*prompt.tolist(), *text_ids])
        write(f"--- sample {number} at step {step}, temperature {config.temperature:g}\n{text}")


def save_samples(path: Folder, texts: Sequence[str], say: Callable[[str], None]) -> None:
    """Replace the samples file; if that fails, log why and continue.

    Args:
      path: of the file.
      texts: the samples.
      say: receives the log line.
    """
    try:
        json_files.replace_text(path, "\n".join(texts) + "\n")
    except OSError as error:
        say(str(cannot_write(path, error, "change its permissions")))


def _prompt(config: Config, tokenizer: Tokenizer) -> np.ndarray:
    """Token ids that every sample begins with: bos, if documents have one, then the prompt.

    An end-of-document token if there is neither.
    """
    ids = [*bos_ids(config.data, tokenizer), *tokenizer.encode(config.eval.sample_prompt)]
    return np.array(ids or [tokenizer.eos_id], np.int32)
