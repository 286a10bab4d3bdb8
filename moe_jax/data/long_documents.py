"""Encodes long documents piece by piece, and refuses those that would fill memory."""

from collections.abc import Callable, Iterator

from moe_jax.data.bad_records import BadRecord

BLOCK_CHARACTERS = 1 << 20  # characters of a text that are converted to bytes at once
PIECE_CHARACTERS = 1 << 18  # characters per piece of a text that may be cut
# Limits if data.max_document_bytes is 0: bytes per document, and bytes per piece.  The tokenizers
# library takes 40 to 110 bytes of memory per byte of text (0.23, measured at 4 MB).
MAX_BYTES = 1 << 30
MAX_PIECE_BYTES = 32 << 20

# (text, position) -> the first position, at or after it, where the text may be cut (Tokenizer.cut).
Cut = Callable[[str, int], int]


def utf8_blocks(text: str) -> Iterator[bytes]:
    """Yield the UTF-8 bytes of a text in blocks."""
    for start in range(0, len(text), BLOCK_CHARACTERS):
        yield text[start : start + BLOCK_CHARACTERS].encode()


def utf8_size(text: str) -> int:
    """The number of bytes of a text in UTF-8."""
    return len(text) if text.isascii() else sum(map(len, utf8_blocks(text)))


def encoding_pieces(text: str, cut: Cut) -> Iterator[str]:
    """Yield the text in pieces that, encoded in order, give its tokens; one piece if it is short.

    Args:
      text: not empty.
      cut: finds where the tokenizer allows a cut.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        stop = cut(text, start + PIECE_CHARACTERS)
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


class DocumentLimit:
    """The limit on the memory that one document takes.

    Args:
      max_bytes: data.max_document_bytes; 0: MAX_BYTES, and MAX_PIECE_BYTES between two cuts.
      cut: finds where the tokenizer allows a cut; None: documents are not encoded.
    """

    def __init__(self, max_bytes: int = 0, cut: Cut | None = None):
        self.max_bytes = max_bytes or MAX_BYTES
        self._at_once = max_bytes or MAX_PIECE_BYTES
        self._cut = cut

    def too_long(self) -> BadRecord:
        """The bad record of a document with more than `max_bytes` bytes."""
        return BadRecord(
            f"is longer than {self.max_bytes:,} bytes",
            "cut it into documents, raise data.max_document_bytes",
        )

    def check(self, text: str) -> BadRecord | None:
        """The bad record of a text that is too long; None if it is not."""
        if len(text) <= self._at_once // 4:  # a character has up to 4 bytes
            return None
        if utf8_size(text) > self.max_bytes:
            return self.too_long()
        if self._cut is None:
            return None
        longest = max(map(utf8_size, encoding_pieces(text, self._cut)))
        if longest > self._at_once:
            return BadRecord(
                f"has {longest:,} bytes that the tokenizer has to encode at once, more than "
                f"{self._at_once:,}",
                "cut it into documents, raise data.max_document_bytes",
            )
        return None
