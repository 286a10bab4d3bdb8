"""Held-out evaluation and samples of a live run."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.data.feed import DeviceFeed, batch_shardings
from moe_jax.data.tokenizers import config_tokenizer
from moe_jax.eval.generate import make_sampler
from moe_jax.eval.heldout import eval_row, make_eval_step
from moe_jax.files import json_files
from moe_jax.files.workdir import Folder
from moe_jax.files.write_errors import cannot_write
from moe_jax.parallel.rules import sharding
from moe_jax.run.context import Run
from moe_jax.train.state import TrainState, everywhere


class Evaluator:
    """Compiles once, then gives a row of held-out numbers for any parameters."""

    def __init__(self, run: Run):
        _, rows, length = run.microbatch
        self._run = run
        self._shape = (1, rows, length)
        # Counted in batches of a whole step, so that accumulation changes nothing.
        limit = run.config.eval.batches * run.config.train.accumulation or len(run.heldout)
        self._batches = min(limit, len(run.heldout))
        step = make_eval_step(run.model, len(run.store.sources), run.mesh)
        self._step = jax.jit(step, out_shardings=everywhere(run.mesh))

    def __call__(self, state: TrainState) -> dict[str, Any]:
        """The same held-out windows every time, so curves are comparable."""
        total: Any = None
        where = batch_shardings(self._run.mesh)
        with DeviceFeed(self._run.heldout.rows, self._shape, where, 0, self._batches) as feed:
            for _, batch in feed:
                sums = jax.tree.map(
                    _wide, jax.device_get(self._step(state.params, state.router, batch))
                )
                total = sums if total is None else jax.tree.map(np.add, total, sums)
        return eval_row(total, self._run.store.sources)


def _wide(x: np.ndarray) -> np.ndarray:
    """Host sums over many batches: counts outgrow int32, and float32 sums lose digits."""
    return np.asarray(x, np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64)


def write_samples(run: Run, state: TrainState, step: int, write: Callable[[str], None]) -> None:
    """Generate texts from the configured prompt and pass each on, decoded."""
    config = run.config.eval
    if not config.samples:
        return
    tokenizer = config_tokenizer(run.config.data)
    # As documents begin: with a bos, where they do.
    prompt = np.array([*run.store.bos_ids, *tokenizer.encode(config.sample_prompt)], np.int32)
    if not prompt.size:
        prompt = np.array([run.store.eos_id], np.int32)
    shards = run.config.mesh.batch_shards
    rows = -(-config.samples // shards) * shards
    tokens_BT = np.full((rows, len(prompt) + config.sample_tokens), run.store.pad_id, np.int32)
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
    """Replace the file of samples; if that fails, a line says so and the run goes on."""
    try:
        json_files.replace_text(path, "\n".join(texts) + "\n")
    except OSError as error:
        say(str(cannot_write(path, error, "change its permissions")))
