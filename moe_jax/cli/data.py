"""Build and describe a store without training, or train a tokenizer on a config's corpus.

python -m moe_jax data --config=configs/tiny.py [--workdir=DIR] [--config.data.KEY=VALUE]
python -m moe_jax data train-bpe --config=... --vocab_size=N --output=tokenizer.json
"""

from collections.abc import Sequence

import numpy as np

from moe_jax.cli.commands import COMMANDS, TRAIN_BPE
from moe_jax.cli.parse import parse
from moe_jax.config import from_config_dict
from moe_jax.data.build import build_store, store_root
from moe_jax.data.config import DataConfig
from moe_jax.data.corpora import find_streams
from moe_jax.data.store import BYTES, SOURCE, SPLITS, START, Split, Store
from moe_jax.data.tokenizers import Tokenizer, config_tokenizer, train_bpe
from moe_jax.errors import UserError
from moe_jax.files.schemes import check_scheme

SAMPLES = 10
SAMPLE_TOKENS = 64


def main(argv: Sequence[str]) -> None:
    """Run the command line above; raises UserError for a mistake in it."""
    if "train-bpe" in argv[1:]:
        arguments = [argument for argument in argv if argument != "train-bpe"]
        parsed = parse(arguments, TRAIN_BPE)
        config = from_config_dict(parsed.config).data
        _train_bpe(config, parsed.flags.vocab_size, parsed.flags.output)
        return
    parsed = parse(argv, COMMANDS["data"])
    config = from_config_dict(parsed.config).data
    check_scheme(parsed.flags.workdir, "--workdir")
    root = store_root(config, parsed.flags.workdir or "runs/data")
    store = build_store(config, root, lambda line: print(line, flush=True))
    for line in describe(store, config_tokenizer(config)):
        print(line)


def describe(store: Store, tokenizer: Tokenizer) -> list[str]:
    """Describe a store: sizes, a table by source, and decoded samples of the train split."""
    lines = [
        f"store        {store.path}",
        f"fingerprint  {store.fingerprint}",
        f"tokenizer    {store.tokenizer}  ({store.vocab_size:,} ids)",
    ]
    splits = {name: getattr(store, name) for name in SPLITS}
    for name, split in splits.items():
        size = int(split.documents[:, BYTES].sum())
        lines.append(
            f"{name:<12} {split.num_tokens:,} tokens, {len(split.documents):,} documents, "
            f"{size / split.num_tokens:.3f} bytes per token"
        )
    if len(store.streams) > 1:
        total = sum(store.weights)
        parts = zip(store.streams, store.weights, strict=True)
        lines.append("mixture      " + ", ".join(f"{n} {w / total:.1%}" for n, w in parts))
    counts = {name: _tokens_by_source(split, store) for name, split in splits.items()}
    width = max(len(source) for source in (*store.sources, "source"))
    lines += ["", f"{'source':<{width}} {'train tokens':>15} {'heldout tokens':>15}"]
    for i, source in enumerate(store.sources):
        row = (f"{counts[name][i]:>15,}" for name in SPLITS)
        lines.append(f"{source:<{width}} {' '.join(row)}")
    lines += ["", f"{SAMPLES} samples of the train split:"]
    return lines + _samples(store, tokenizer)


def _tokens_by_source(split: Split, store: Store) -> np.ndarray:
    lengths = np.diff(split.documents[:, START], append=split.num_tokens)
    sources = split.documents[:, SOURCE]
    return np.bincount(sources, lengths, minlength=len(store.sources)).astype(np.int64)


def _samples(store: Store, tokenizer: Tokenizer) -> list[str]:
    """Decode tokens at evenly spaced positions, one line each."""
    split = store.train
    starts = np.linspace(0, max(0, split.num_tokens - SAMPLE_TOKENS), SAMPLES).astype(int).tolist()
    ranges = [(start, min(start + SAMPLE_TOKENS, split.num_tokens)) for start in starts]
    texts = (tokenizer.decode(tokens) for tokens in split.read(ranges))
    return [f"{start:>12,}  {text!r}" for start, text in zip(starts, texts, strict=True)]


def _train_bpe(config: DataConfig, vocab_size: int, output: str) -> None:
    if not output:
        raise UserError("--output is missing: set it to the tokenizer.json to write.")
    streams = find_streams(config)
    documents = (doc.text for stream in streams for doc in stream.documents())
    tokenizer = train_bpe(documents, vocab_size, output)
    left_out = sum(len(stream.bad) for stream in streams)
    if left_out:
        print(f"{left_out:,} bad records skipped: python -m moe_jax data lists them")
    print(f"{output}: {tokenizer.vocab_size:,} ids; use it with --config.data.tokenizer={output}")
