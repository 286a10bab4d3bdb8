"""Documents as long as books: taken block by block, and refused where they would fill memory."""

from collections.abc import Callable, Iterator

from moe_jax.data.bad_records import BadRecord

BLOCK_CHARACTERS = 1 << 20  # of a text that are turned into bytes at once
PIECE_CHARACTERS = 1 << 18  # of a text that are encoded at once, where it may be cut
# Without data.max_document_bytes: of a document, and of what has to be encoded at once.  The
# tokenizers library takes 40 to 110 bytes of memory for one of text (0.23, measured at 4 MB).
MOST = 1 << 30
MOST_AT_ONCE = 32 << 20


# The first place, the given one or later, where a text may be cut: see Tokenizer.cut.
Cut = Callable[[str, int], int]


def utf8_blocks(text: str) -> Iterator[bytes]:
    """The UTF-8 bytes of a text, a part at a time."""
    for start in range(0, len(text), BLOCK_CHARACTERS):
        yield text[start : start + BLOCK_CHARACTERS].encode()


def utf8_size(text: str) -> int:
    """Bytes of a text in UTF-8."""
    return len(text) if text.isascii() else sum(map(len, utf8_blocks(text)))


def encoding_pieces(text: str, cut: Cut) -> Iterator[str]:
    """The text in pieces whose tokens, one after the other, are its own; one piece if it is short.

    Args:
      text: any, not empty.
      cut: where the tokenizer lets it be cut.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        stop = cut(text, start + PIECE_CHARACTERS)
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


class DocumentLimit:
    """What one document may take in memory.

    Args:
      max_bytes: data.max_document_bytes; 0: MOST, and MOST_AT_ONCE of what has no place to cut.
      cut: where the tokenizer lets a text be cut; None: documents are not encoded.
    """

    def __init__(self, max_bytes: int = 0, cut: Cut | None = None):
        self.most = max_bytes or MOST
        self._at_once = max_bytes or MOST_AT_ONCE
        self._cut = cut

    def too_long(self) -> BadRecord:
        """The bad record of a document with more than `most` bytes."""
        return BadRecord(
            f"is longer than {self.most:,} bytes",
            "cut it into documents, raise data.max_document_bytes",
        )

    def check(self, text: str) -> BadRecord | None:
        """The bad record of a text that is too long; None: it is not."""
        if len(text) <= self._at_once // 4:  # a character has up to 4 bytes
            return None
        if utf8_size(text) > self.most:
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
