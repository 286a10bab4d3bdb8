"""Tokenises a corpus into a store, once; split_writer.py writes its splits.

A killed build resumes where it stopped.  A failed build leaves nothing, unless it has written
whole shards: the next build of the same text resumes after them.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts
from etils import epath

from moe_jax.data import bad_records
from moe_jax.data.build_lock import BuildLock
from moe_jax.data.config import DataConfig
from moe_jax.data.corpora import Stream, find_streams
from moe_jax.data.encoding import cores
from moe_jax.data.heldout import HeldOutSplitter, share_warnings
from moe_jax.data.rate import Rate
from moe_jax.data.split_writer import LAYOUT, PARTS, ChunkSizes, SplitWriter, writing
from moe_jax.data.store import (
    BYTES,
    MANIFEST,
    SOURCE,
    SPLITS,
    START,
    STORE_FORMAT,
    Store,
    array_digests,
    key_value_store,
    manifest_bytes,
    open_store,
    read_manifest,
)
from moe_jax.data.tokenizers import Tokenizer, bos_ids, config_tokenizer
from moe_jax.errors import UserError
from moe_jax.files.schemes import check_scheme


class Fingerprints(NamedTuple):
    """SHA-256 of everything that determines a store's content; folders and weights do not."""

    fingerprint: str  # names the store's folder
    content: str  # as `fingerprint`, without the names of files, which only label their text
    earlier: tuple[str, ...]  # fingerprints that earlier formats gave to the same tokens


def build_store(
    config: DataConfig,
    root: str | os.PathLike,
    progress: Callable[[str], None] | None = None,
    layout: ChunkSizes = LAYOUT,
    on_progress: Callable[[], None] = lambda: None,
) -> Store:
    """Open the store of `config` under `root`; build it, or finish its build, if necessary.

    A store's folder is named by its fingerprint, so a changed file, tokenizer or split never uses
    an old store.  On a host with several processes, one builds and the others wait.

    Args:
      config: the corpus, its tokenizer and the split.
      root: folder of all stores, local or gs://.
      progress: called with lines for the log; None: nothing is logged.
      layout: chunk and shard sizes.
      on_progress: called when this process, or the builder that it waits for, has read some text.

    Returns:
      The store, open for reading.

    Raises:
      UserError: the input cannot be used (see corpora.py, tokenizers.py), or the corpus is too
        small to hold some of it out.
    """
    say = progress or (lambda line: None)
    root = _checked_root(root)
    tokenizer = config_tokenizer(config)
    turn = BuildLock(on_progress)
    streams = find_streams(config, turn.on_progress, tokenizer.cut)
    for line in (line for stream in streams for line in stream.notes):
        say(line)
    known = store_fingerprints(config, streams, tokenizer, layout)
    path = root / known.fingerprint[:16]
    if read_manifest(path) is not None:
        if bad_records.file_of(path).exists():
            say(f"the store lacks the bad records listed in {bad_records.file_of(path)}")
    else:  # no lock for a finished store, whose folder may be read-only
        with turn(root, path.name):
            if read_manifest(path) is None:  # no other process built it meanwhile
                say(f"building the store {path}")
                _tell_unfinished(root, path.name, say)
                with _cleaning(path):
                    _write(path, config, streams, tokenizer, layout, known.fingerprint, say, turn)
    store = _opened(path, streams, known)
    for line in share_warnings(store, config):
        say(line)
    return store


@contextlib.contextmanager
def _cleaning(path: epath.Path) -> Iterator[None]:
    """Delete the folder `path` of a build that fails, unless it has written whole shards."""
    try:
        yield
    except UserError:
        with contextlib.suppress(Exception):  # the error is what matters
            if not any((path / split / PARTS).exists() for split in SPLITS):
                path.rmtree()
        raise


@contextlib.contextmanager
def _telling_bad_records(
    path: epath.Path, streams: tuple[Stream, ...], say: Callable[[str], None]
) -> Iterator[None]:
    """Write the bad records of a build when it ends, also if they end it."""
    try:
        yield
    except UserError:
        with contextlib.suppress(OSError):  # the error is what matters
            bad_records.write([stream.bad for stream in streams], path, say)
        raise
    with writing(path):
        bad_records.write([stream.bad for stream in streams], path, say)


def _tell_unfinished(root: epath.Path, name: str, say: Callable[[str], None]) -> None:
    """Log the unfinished folders of other builds in the local folder `root`."""
    if "://" in os.fspath(root):
        return
    for path in sorted(root.iterdir(), key=os.fspath):
        # A folder without splits is not a store.
        if path.name != name and (path / SPLITS[0]).is_dir() and not (path / MANIFEST).exists():
            say(
                f"{path} is not finished: the build of a different text was stopped or is still "
                f"running. Delete it if no run will resume it."
            )


def open_built_store(
    config: DataConfig, root: str | os.PathLike, layout: ChunkSizes = LAYOUT
) -> Store:
    """Open the store of `config` without writing anything: for configs that come from a file.

    Raises:
      UserError: as `build_store`, or there is no store.
    """
    tokenizer = config_tokenizer(config)
    streams = find_streams(config, cut=tokenizer.cut)
    known = store_fingerprints(config, streams, tokenizer, layout)
    path = _checked_root(root) / known.fingerprint[:16]
    if read_manifest(path) is None:
        raise UserError(f"There is no store {path}: build it with python -m moe_jax data.")
    return _opened(path, streams, known)


def _opened(path: epath.Path, streams: tuple[Stream, ...], known: Fingerprints) -> Store:
    store = open_store(path, [stream.weight for stream in streams], known.earlier, known.content)
    if store.fingerprint != known.fingerprint:
        raise UserError(f"{path} holds a store whose fingerprint is not its name: delete it.")
    return store


def store_root(config: DataConfig, workdir: str | os.PathLike) -> epath.Path:
    """The folder of the stores of a run in `workdir`: data.store, or WORKDIR/../stores."""
    folder = epath.Path(workdir).expanduser()
    if not config.store:
        return (folder if "://" in os.fspath(workdir) else folder.resolve()).parent / "stores"
    return _checked_root(config.store)


def _checked_root(root: str | os.PathLike) -> epath.Path:
    """The folder of stores; raises UserError for a URL, which TensorStore would take for a path."""
    check_scheme(os.fspath(root), "data.store")
    return epath.Path(root).expanduser()


def store_fingerprints(
    config: DataConfig, streams: tuple[Stream, ...], tokenizer: Tokenizer, layout: ChunkSizes
) -> Fingerprints:
    """Compute the fingerprints of the store of a config."""
    fraction = config.heldout_fraction
    digests = [list(stream.digests()) for stream in streams]  # reads every file
    payload: dict[str, Any] = {
        "format": 2,
        "layout": dataclasses.asdict(layout),
        "tokenizer": tokenizer.identity,
        "heldout_fraction": fraction,
        "streams": [
            [stream.name, stream.kind, stream.field, stream.sources, files]
            for stream, files in zip(streams, digests, strict=True)
        ],
    }
    heldout = [len(stream.heldout_files) for stream in streams]
    changed = {
        "format": STORE_FORMAT,
        "bos": config.begin_with_bos,
        "heldout_fraction": None if any(heldout) else fraction,
        "heldout_files": heldout,  # number per stream; their digests are its last ones
    }
    # Format 2 wrote the same tokens, except with tokenizers from files; their identity is
    # different in format 3, so `earlier` matches none of their stores.
    same = not config.begin_with_bos and not any(heldout)
    unnamed = [
        [stream.name, stream.kind, stream.field, [digest for _, digest in files]]
        for stream, files in zip(streams, digests, strict=True)
    ]
    return Fingerprints(
        _sha256(payload | changed),
        _sha256(payload | changed | {"streams": unnamed}),
        (_sha256(payload),) if same else (),
    )


def _sha256(payload: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(payload).encode()).hexdigest()


def _write(
    path: epath.Path,
    config: DataConfig,
    streams: tuple[Stream, ...],
    tokenizer: Tokenizer,
    layout: ChunkSizes,
    fingerprint: str,
    say: Callable[[str], None],
    turn: BuildLock,
) -> None:
    """Write both splits, then the manifest, which marks the store as finished."""
    sources = [source for stream in streams for source in stream.sources]
    ids = {source: i for i, source in enumerate(sources)}
    stream_of = np.repeat(np.arange(len(streams)), [len(stream.sources) for stream in streams])
    bounds, rate = {}, Rate()
    bos = bos_ids(config, tokenizer)
    with _telling_bad_records(path, streams, say):
        hold_out = HeldOutSplitter(streams, config.heldout_fraction)
        for split in SPLITS:
            writer = SplitWriter(path / split, tokenizer, layout, ids, bos)
            documents = hold_out.split(split)
            total, table = writer.write(
                documents,
                lambda line, split=split: say(f"{split}: {line}"),
                turn.on_progress,
                cores(),
            )
            rate.add(int(table[:, BYTES].sum()))
            first = np.searchsorted(stream_of[table[:, SOURCE]], np.arange(len(streams)))
            bounds[split] = [*table[first, START].tolist(), total]
    manifest = {
        "format": STORE_FORMAT,
        "fingerprint": fingerprint,
        "tokenizer": tokenizer.identity,
        "vocab_size": tokenizer.vocab_size,
        "bos_ids": list(bos),
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "streams": [stream.name for stream in streams],
        "sources": sources,
        "splits": bounds,
    }
    folder = key_value_store(path)
    with writing(path):
        manifest["arrays"] = array_digests(folder)
        folder.write(MANIFEST, manifest_bytes(manifest)).result()
    say(f"store built: {rate}")
    if hold_out.left_out:
        say(f"train: {hold_out.left_out:,} documents left out because they are also held out")
    for split in SPLITS:
        folder.delete_range(ts.KvStore.KeyRange(f"{split}/parts/", f"{split}/parts0")).result()
