"""Reads the serialised model of SentencePiece, and turns pieces of it into control symbols.

The library neither gives the kind of a piece nor lets it be changed, so this file reads a few
fields of the protocol buffer.

Reference: sentencepiece_model.proto; https://protobuf.dev/programming-guides/encoding.
"""

from collections.abc import Collection, Iterator
from typing import NamedTuple


class Piece(NamedTuple):
    """One entry of a SentencePiece vocabulary."""

    name: str
    kind: int


NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # kinds of a piece
_PIECES, _NAME, _KIND = 0x0A, 0x0A, 0x18  # tags on the wire: field << 3 | wire type
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


def sentencepieces(model: bytes) -> list[Piece]:
    """Read the vocabulary of a serialised SentencePiece model, by id.

    Raises:
      ValueError, IndexError: the bytes are not such a model.
    """
    found = []
    for tag, entry, _ in _fields(model):
        if tag == _PIECES and isinstance(entry, bytes):
            fields = {tag: value for tag, value, _ in _fields(entry)}
            name, kind = fields.get(_NAME, b""), fields.get(_KIND, NORMAL)
            if not isinstance(name, bytes) or not isinstance(kind, int):
                raise ValueError("a piece has fields of other types")
            found.append(Piece(name.decode("utf-8"), kind))
    return found


def as_control(model: bytes, ids: Collection[int]) -> bytes:
    """Copy the model with these pieces as control symbols, which it never finds in text.

    If a field occurs twice, the last one counts, so the kind is added to the end of the piece.
    """
    parts, start, place = [], 0, 0
    for tag, entry, end in _fields(model):
        if tag == _PIECES and isinstance(entry, bytes):
            if place in ids:
                entry += bytes([_KIND, CONTROL])
                parts.append(bytes([_PIECES]) + _varint_bytes(len(entry)) + entry)
                start = end
            place += 1
        if start != end:
            parts.append(model[start:end])
            start = end
    return b"".join(parts)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes, int]]:
    """Yield (tag, value, position after it) of each field of a protocol buffer."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        size = {_FIXED64: 8, _FIXED32: 4}.get(tag & 7)
        if tag & 7 == _VARINT:
            value, place = _varint(message, place)
            yield tag, value, place
            continue
        if tag & 7 == _BYTES:
            size, place = _varint(message, place)
        if size is None or place + size > len(message):
            raise ValueError("a field is truncated or has an unknown wire type")
        yield tag, message[place : place + size], place + size
        place += size


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place


def _varint_bytes(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
