"""A process that reads what it is told to: native readers may abort, hang or ask for all memory.

One JSON object a line on stdin, {"read": NAME, "path": FILE}; one on stdout for each: what came of
it ("ok", "refused" or "raised"), the message, and how many bytes the process has ever held.
"""

import json
import resource
import sys
from collections.abc import Callable

from moe_jax.data.config import DataConfig
from moe_jax.data.corpora import find_streams
from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.errors import UserError

TEXTS = ["def f(x):\n    return x\n", "größe 日本 🙂", "", "the router sends a token"]


def _corpus(kind: str) -> Callable[[str], object]:
    def read(path: str) -> object:
        (stream,) = find_streams(DataConfig(source=kind, files=path))
        list(stream.digests())
        return [document.text.encode() for document in stream.documents()]

    return read


def _tokenizer(path: str) -> object:
    tokenizer = load_tokenizer(path)
    for ids in tokenizer.encode_batch(TEXTS):
        tokenizer.decode(ids)
    return None


READERS = {
    "text": _corpus("text"),
    "jsonl": _corpus("jsonl"),
    "parquet": _corpus("parquet"),
    "tokenizer": _tokenizer,
}


def answer(order: dict[str, str]) -> dict[str, object]:
    """What came of one order."""
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
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
