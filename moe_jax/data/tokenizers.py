"""Text to token ids and back."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, SupportsIndex

import numpy as np
from etils import epath
from jaxtyping import Integer

from moe_jax.errors import UserError

LARGEST = 2**31 - 1  # ids are int32 on the devices
END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
# Names under which published tokenizers keep the token that ends a document, and padding.
KNOWN_EOS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
KNOWN_PAD = (PADDING, "<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>")


class Tokenizer(Protocol):
    """What the data pipeline needs of a tokenizer.

    A tokenizer without an end-of-document or padding token gets one beyond its own vocabulary;
    `vocab_size` counts them.
    """

    vocab_size: int  # V
    eos_id: int  # ends every document
    pad_id: int
    identity: str  # SHA-256 that changes when the tokens of some text would

    def encode(self, text: str) -> Integer[np.ndarray, "T"]:
        """Token ids of a text, without any special token added."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of many texts at once."""
        ...

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text of token ids; eos and padding become nothing, broken UTF-8 becomes U+FFFD."""
        ...


class BytesTokenizer:
    """UTF-8 bytes as tokens: 256 + eos + padding."""

    vocab_size = 258
    eos_id = 256
    pad_id = 257
    identity = hashlib.sha256(b"bytes").hexdigest()

    def encode(self, text: str) -> Integer[np.ndarray, "T"]:
        """See `Tokenizer`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """See `Tokenizer`."""
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", errors="replace")


class JsonTokenizer:
    """A Hugging Face tokenizer.json."""

    def __init__(self, path: epath.Path):
        import tokenizers

        raw = read_tokenizer_file(path)
        self._path = path
        with _library(f"{path} is not a tokenizer.json"):
            self._tokenizer = tokenizers.Tokenizer.from_str(raw.decode("utf-8"))
            # Stored for fine-tuning; here they would cut documents and add padding to the stream.
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError(f"{path} has an empty vocabulary: name another tokenizer.json.")
        ids = _special_ids(
            next((vocabulary[name] for name in KNOWN_EOS if name in vocabulary), None),
            next((vocabulary[name] for name in KNOWN_PAD if name in vocabulary), None),
            max(vocabulary.values()) + 1,  # ids may have holes: the largest counts
            path,
        )
        self.eos_id, self.pad_id, self.vocab_size = ids
        self.identity = hashlib.sha256(b"tokenizer.json" + raw).hexdigest()

    def encode(self, text: str) -> Integer[np.ndarray, "T"]:
        """See `Tokenizer`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        with _library(f"{self._path} fails on a text"):
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int64) for encoding in encodings]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """See `Tokenizer`."""
        special = (self.eos_id, self.pad_id)
        with _library(f"{self._path} fails on token ids"):
            return self._tokenizer.decode([i for i in map(int, ids) if i not in special])


class SentencePieceTokenizer:
    """A SentencePiece .model file."""

    def __init__(self, path: epath.Path):
        try:
            import sentencepiece
        except ImportError:
            raise UserError(
                "SentencePiece models need sentencepiece: pip install 'moe_jax[data]'."
            ) from None
        raw = read_tokenizer_file(path)
        self._path = path
        self._processor = sentencepiece.SentencePieceProcessor()
        with _library(f"{path} is not a SentencePiece model"):
            self._processor.LoadFromSerializedProto(raw)
        eos, pad = self._processor.eos_id(), self._processor.pad_id()
        ids = _special_ids(
            eos if eos >= 0 else None,
            pad if pad >= 0 else None,
            self._processor.vocab_size(),
            path,
        )
        self.eos_id, self.pad_id, self.vocab_size = ids
        self.identity = hashlib.sha256(b"sentencepiece" + raw).hexdigest()

    def encode(self, text: str) -> Integer[np.ndarray, "T"]:
        """See `Tokenizer`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        with _library(f"{self._path} fails on a text"):
            return [np.asarray(ids, np.int64) for ids in self._processor.encode(list(texts))]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """See `Tokenizer`."""
        special = (self.eos_id, self.pad_id)
        with _library(f"{self._path} fails on token ids"):
            return self._processor.decode([i for i in map(int, ids) if i not in special])


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a name, as `data.tokenizer` has it.

    Args:
      name: `bytes`, or the path (local or gs://) of a tokenizer.json or a SentencePiece .model.

    Returns:
      What encodes text to int32 ids and decodes them.

    Raises:
      UserError: a name of neither form, or a file that is missing or of another format.
    """
    if name == "bytes":
        return BytesTokenizer()
    if name.endswith(".json"):
        return JsonTokenizer(epath.Path(name))
    if name.endswith(".model"):
        return SentencePieceTokenizer(epath.Path(name))
    raise UserError(
        f"data.tokenizer is {name!r}: use 'bytes', a path ending in .json (tokenizer.json) or one "
        "ending in .model (SentencePiece)."
    )


def train_bpe(texts: Iterable[str], vocab_size: int, output: str | os.PathLike) -> Tokenizer:
    """Train a byte-level BPE on `texts`, write it as a tokenizer.json, and load it.

    Byte-level BPE (GPT-2): the alphabet is the 256 bytes, so every text round-trips.

    Raises:
      UserError: a vocabulary smaller than the bytes and the two special tokens, or an output that
        cannot be written.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 258:
        raise UserError(
            f"vocab_size is {vocab_size}: a byte-level BPE needs 258 or more (the bytes, eos, pad)."
        )
    path = epath.Path(output)
    if path.suffix != ".json":
        raise UserError(f"The output {path} must end in .json, so that data.tokenizer can name it.")
    try:  # before the hours of training, not after
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        raise UserError(
            f"The output {path} cannot be written ({error.strerror or error}): name another."
        ) from None
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    path.write_text(json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, indent=1))
    return load_tokenizer(os.fspath(path))


def read_tokenizer_file(path: epath.Path) -> bytes:
    """The bytes of a tokenizer's file; raises UserError where it is missing or unreadable."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"data.tokenizer: there is no file {path}: name another.") from None
    except OSError as error:
        raise UserError(
            f"data.tokenizer: {path} cannot be read ({error.strerror or error}): name a file that "
            f"can."
        ) from None


@contextlib.contextmanager
def _library(what: str) -> Iterator[None]:
    """Raises UserError where a tokenizer library fails on a file that is not what it should be."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is not an Exception
        raise UserError(f"{what} ({str(error).rstrip('.')}): name another.") from None


def _special_ids(
    eos: int | None, pad: int | None, size: int, path: epath.Path
) -> tuple[int, int, int]:
    """(eos, pad, vocabulary size), adding ids after the vocabulary for those that are missing."""
    if eos is None:
        eos, size = size, size + 1
    if pad is None:
        pad, size = size, size + 1
    if size > LARGEST:
        raise UserError(f"{path} has token ids up to {size - 1}: name one with at most {LARGEST}.")
    return eos, pad, size
