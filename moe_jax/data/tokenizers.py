"""Tokenizers: encode text to token ids and decode them."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, SupportsIndex

import numpy as np
from etils import epath
from jaxtyping import Integer

from moe_jax.data import sentencepiece_file
from moe_jax.data.config import DataConfig
from moe_jax.data.control_tokens import (
    END_OF_TEXT,
    MARK,
    PADDING,
    UNNAMED,
    SpecialNames,
    TokenizerFile,
    declared_names,
    find_special,
    pieces,
    spelling,
)
from moe_jax.data.safe_cuts import safe_cut
from moe_jax.data.tokenizer_file import identity, library, read_tokenizer_file, special_ids
from moe_jax.errors import UserError
from moe_jax.files.schemes import check_scheme
from moe_jax.files.whole import write_whole


class Tokenizer(Protocol):
    """The interface of a tokenizer in the data pipeline.

    Text is data: no text is encoded to the id of a control token, whatever it spells.  A tokenizer
    without an end-of-document or padding token gets one beyond its own vocabulary; `vocab_size`
    counts them.
    """

    vocab_size: int  # V: every id is below it
    bos_id: int | None  # begins every document under data.begin_with_bos; None: there is none
    eos_id: int  # ends every document
    pad_id: int  # fills positions without text
    identity: str  # SHA-256 that changes if the tokens of some text change

    def encode(self, text: str) -> Integer[np.ndarray, "T"]:
        """Encode a text, without adding special tokens.

        Args:
          text: any Unicode.

        Returns:
          Ids [T].
        """
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode many texts at once.

        Args:
          texts: any number of them.

        Returns:
          The ids of each text.
        """
        ...

    def cut(self, text: str, start: int) -> int:
        """Find the first position, `start` or later, where a text may be cut.

        The concatenated ids of the two parts are those of the text.

        Args:
          text: any Unicode.
          start: in characters, above 0.

        Returns:
          The position in characters; the length of the text: there is none.
        """
        ...

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Decode token ids.

        Args:
          ids: of one text; bos, eos and padding are dropped.

        Returns:
          The text, with U+FFFD for broken UTF-8.
        """
        ...


class BytesTokenizer:
    """UTF-8 bytes as tokens: 256 + eos + padding."""

    vocab_size = 258
    bos_id: int | None = None
    eos_id = 256
    pad_id = 257
    identity = hashlib.sha256(b"bytes").hexdigest()

    def encode(self, text: str) -> Integer[np.ndarray, "T"]:
        """See `Tokenizer`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def cut(self, text: str, start: int) -> int:
        """See `Tokenizer`."""
        return min(start, len(text))

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """See `Tokenizer`."""
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", errors="replace")


class JsonTokenizer:
    """A Hugging Face tokenizer.json.

    Texts are encoded by a copy that spells control tokens in a way that texts do not match.
    """

    def __init__(self, path: epath.Path, names: SpecialNames = UNNAMED):
        import tokenizers

        raw = read_tokenizer_file(path)
        self._path = path
        with library(f"{path} is not a tokenizer.json"):
            self._tokenizer = tokenizers.Tokenizer.from_str(raw.decode("utf-8"))
            vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
            file = TokenizerFile(raw)
            whole = vocabulary.keys() - file.merged
        if not vocabulary:
            raise UserError(f"{path} has an empty vocabulary: name another tokenizer.json.")
        declared, found = declared_names(path.parent), {}
        for kind, asked in names._asdict().items():
            found[kind] = find_special(
                kind, asked, getattr(declared, kind), vocabulary, file.added, whole, path
            )
        self.bos_id = found["bos"]
        self.eos_id, self.pad_id, self.vocab_size = special_ids(
            found["eos"],
            found["pad"],
            max(vocabulary.values()) + 1,  # ids may have gaps, so the largest counts
            path,
        )
        special, marks = {self.bos_id, self.eos_id, self.pad_id}, file.control()
        control = {n: i for n, i in vocabulary.items() if i in special or n in marks}
        letter = next((name for name in marks if len(name) == 1), "")
        if letter:  # without its spelling, texts that hold it could not be encoded
            raise UserError(
                f"{path} has the special token {letter!r}, a character that texts contain: name a "
                f"tokenizer without it."
            )
        with library(f"{path} is not a tokenizer.json"):
            respelled = file.respelled({name: spelling(place) for name, place in control.items()})
            self._encoder = self._without(respelled, control, vocabulary)
            normalizer = self._encoder.normalizer
            self._cuts = safe_cut(
                respelled, normalizer.normalize_str if normalizer else lambda text: text
            )
            unknown = vocabulary.get(file.unknown() or "")
        self._names = {place: name for name, place in control.items()}
        self._control = np.zeros(self.vocab_size, bool)
        # The unknown token comes from text that the model cannot encode, and from nothing else.
        self._control[[i for i in control.values() if i != unknown or i in special]] = True
        self.identity = identity(b"tokenizer.json", raw, (self.bos_id, self.eos_id, self.pad_id))

    @staticmethod
    def _without(
        respelled: dict[str, Any], control: dict[str, int], vocabulary: dict[str, int]
    ) -> Any:
        """Load the tokenizer whose control tokens are respelled."""
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(respelled, ensure_ascii=False))
        own = {name: spelling(place) for name, place in control.items()}
        expected = {own.get(name, name): place for name, place in vocabulary.items()}
        if tokenizer.get_vocab(with_added_tokens=True) != expected:
            raise ValueError("its added tokens and its vocabulary do not fit together")
        return tokenizer

    def encode(self, text: str) -> Integer[np.ndarray, "T"]:
        """See `Tokenizer`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        rows = self._encode(texts)
        for number, text in enumerate(texts):
            if len(cut := pieces(text)) > 1:
                rows[number] = np.concatenate(self._encode(cut))
            control = rows[number][self._control[rows[number]]]
            if len(control):  # an unusual normalizer or model
                token = int(control[0])
                raise UserError(
                    f"{self._path} gives the control token {self._names.get(token, token)!r} for "
                    f"text that does not spell it: name another tokenizer."
                )
        return rows

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        with library(f"{self._path} fails on a text"):
            encodings = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int64) for encoding in encodings]

    def cut(self, text: str, start: int) -> int:
        """See `Tokenizer`."""
        found = self._cuts.search(text, max(0, start - 1)) if self._cuts else None
        return found.end() if found else len(text)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """See `Tokenizer`."""
        special = (self.bos_id, self.eos_id, self.pad_id)
        with library(f"{self._path} fails on token ids"):
            return self._tokenizer.decode([i for i in map(int, ids) if i not in special])


class SentencePieceTokenizer:
    """A SentencePiece .model file.

    Texts are encoded by a copy in which user-defined marks, which the library looks for in every
    text, are control symbols.
    """

    def __init__(self, path: epath.Path, names: SpecialNames = UNNAMED):
        try:
            import sentencepiece
        except ImportError:
            raise UserError(
                "SentencePiece models need sentencepiece: pip install 'moe_jax[data]'."
            ) from None
        raw = read_tokenizer_file(path)
        self._path = path
        self._processor = sentencepiece.SentencePieceProcessor()
        with library(f"{path} is not a SentencePiece model"):
            self._processor.LoadFromSerializedProto(raw)
            found = sentencepiece_file.sentencepieces(raw)
        vocabulary = {piece.name: place for place, piece in enumerate(found)}
        apart = (sentencepiece_file.CONTROL, sentencepiece_file.USER_DEFINED)
        added = {piece.name for piece in found if piece.kind in apart}
        declared, ids = declared_names(path.parent), {}
        for kind, asked in names._asdict().items():
            own = getattr(self._processor, f"{kind}_id")()
            ids[kind] = find_special(
                kind,
                asked,
                getattr(declared, kind) or (found[own].name if own >= 0 else ""),
                vocabulary,
                added,
                (),
                path,
            )
        self.bos_id = ids["bos"]
        self.eos_id, self.pad_id, self.vocab_size = special_ids(
            ids["eos"], ids["pad"], self._processor.vocab_size(), path
        )
        special = {self.bos_id, self.eos_id, self.pad_id}
        marks = {
            place
            for place, piece in enumerate(found)
            if place in special
            or (piece.kind == sentencepiece_file.USER_DEFINED and MARK.fullmatch(piece.name))
        }
        self._encoder = sentencepiece.SentencePieceProcessor()
        with library(f"{path} is not a SentencePiece model"):
            self._encoder.LoadFromSerializedProto(sentencepiece_file.as_control(raw, marks))
        self.identity = identity(b"sentencepiece", raw, (self.bos_id, self.eos_id, self.pad_id))

    def encode(self, text: str) -> Integer[np.ndarray, "T"]:
        """See `Tokenizer`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        with library(f"{self._path} fails on a text"):
            return [np.asarray(ids, np.int64) for ids in self._encoder.encode(list(texts))]

    def cut(self, text: str, start: int) -> int:
        """See `Tokenizer`; never cuts, because pieces may hold blanks and line ends."""
        return len(text)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """See `Tokenizer`."""
        special = (self.bos_id, self.eos_id, self.pad_id)
        with library(f"{self._path} fails on token ids"):
            return self._processor.decode([i for i in map(int, ids) if i not in special])


def load_tokenizer(name: str, names: SpecialNames = UNNAMED) -> Tokenizer:
    """Load the tokenizer that `data.tokenizer` names.

    Args:
      name: `bytes`, or the path (local or gs://) of a tokenizer.json or a SentencePiece .model.
      names: of the bos, eos and padding tokens; an empty one is read from tokenizer_config.json
        beside the file, else found by the names that published tokenizers use.

    Returns:
      The tokenizer; its ids fit into int32.

    Raises:
      UserError: the name has neither form, the file is missing or of another format, or the file
        does not have one of the tokens.
    """
    if name == "bytes":
        for kind, asked in names._asdict().items():
            if asked:
                raise UserError(
                    f"data.{kind} is {asked!r}, but the tokenizer 'bytes' has no named tokens: "
                    f"leave it empty, or set data.tokenizer to a file."
                )
        return BytesTokenizer()
    check_scheme(name, "data.tokenizer")
    path = epath.Path(name).expanduser()
    if name.endswith(".json"):
        return JsonTokenizer(path, names)
    if name.endswith(".model"):
        return SentencePieceTokenizer(path, names)
    raise UserError(
        f"data.tokenizer is {name!r}: use 'bytes', a path ending in .json (tokenizer.json) or one "
        "ending in .model (SentencePiece)."
    )


def config_tokenizer(config: DataConfig) -> Tokenizer:
    """Load the tokenizer of a config.

    Raises:
      UserError: as `load_tokenizer`, or documents are to begin with a token that the tokenizer does
        not have.
    """
    tokenizer = load_tokenizer(config.tokenizer, SpecialNames(config.bos, config.eos, config.pad))
    if config.begin_with_bos and tokenizer.bos_id is None:
        raise UserError(
            f"data.begin_with_bos is True, but no token of {config.tokenizer!r} is known to begin "
            f"documents: set data.bos to its name, or data.begin_with_bos to False."
        )
    return tokenizer


def bos_ids(config: DataConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that begin every document: the bos token or none."""
    if config.begin_with_bos and tokenizer.bos_id is not None:
        return (tokenizer.bos_id,)
    return ()


def train_bpe(texts: Iterable[str], vocab_size: int, output: str | os.PathLike) -> Tokenizer:
    """Train a byte-level BPE on `texts`, write it as a tokenizer.json, and load it.

    Byte-level BPE (GPT-2): the alphabet is the 256 bytes, so every text round-trips.  A failure
    leaves the output as it was.

    Raises:
      UserError: the vocabulary is smaller than the bytes and the two special tokens, or the output
        cannot be written.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 258:
        raise UserError(
            f"vocab_size is {vocab_size}: a byte-level BPE needs 258 or more (the bytes, eos, pad)."
        )
    check_scheme(os.fspath(output), "The output")
    path = epath.Path(output).expanduser()
    if path.suffix != ".json":
        raise UserError(f"The output {path} must end in .json, so that data.tokenizer can name it.")
    with write_whole(path, "The output") as unfinished:  # before hours of training
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
        made = json.loads(tokenizer.to_str())
        unfinished.write_text(json.dumps(made, ensure_ascii=False, indent=1), encoding="utf-8")
    return load_tokenizer(os.fspath(path))
