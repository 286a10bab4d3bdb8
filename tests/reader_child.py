"""A process that reads files for a test: native readers may abort, hang or take all memory.

Each line of stdin is a JSON object {"read": NAME, "path": FILE}.  Each line of stdout answers one:
`outcome` ("ok", "refused" or "raised"), `message`, and `held`, the peak memory in bytes.
"""

import json
import resource
import sys
from collections.abc import Callable

import numpy as np

from moe_jax.data.config import DataConfig
from moe_jax.data.corpora import find_streams
from moe_jax.data.pipeline import Batches, HeldOut
from moe_jax.data.store import open_store
from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.errors import UserError

ADDRESSES = 16 << 30  # bytes: an allocation beyond this fails, as it would on a full machine
TEXTS = ["def f(x):\n    return x\n", "größe 日本 🙂", "", "the router picks an expert"]


def _parquet(path: str) -> None:
    (stream,) = find_streams(DataConfig(source="parquet", files=path, bad_records="skip"))
    list(stream.digests())
    for document in stream.documents():
        document.text.encode()


def _tokenizer(path: str) -> None:
    tokenizer = load_tokenizer(path)
    for ids in tokenizer.encode_batch(TEXTS):
        tokenizer.decode(ids)


def _store(path: str) -> None:
    store = open_store(path)
    rows = np.arange(4)
    batches = Batches.for_training(store, 0, 4, 16)
    for step in range(4):
        batches.rows(step, rows)
    HeldOut(store, 4, 16).rows(0, rows)
    for split in (store.train, store.heldout):
        split.read([(0, split.num_tokens)])


READERS: dict[str, Callable[[str], None]] = {
    "parquet": _parquet,
    "tokenizer": _tokenizer,
    "store": _store,
}


def answer(order: dict[str, str]) -> dict[str, object]:
    """Read one file and describe the outcome."""
    outcome, message = "ok", ""
    try:
        READERS[order["read"]](order["path"])
    except UserError as error:
        outcome, message = "refused", str(error)
    except BaseException as error:  # a Rust panic is not an Exception
        outcome, message = "raised", f"{type(error).__name__}: {error}"
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"outcome": outcome, "message": message, "held": held}


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
