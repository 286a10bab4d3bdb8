"""Readers of files, one per kind: each yields the texts of a file in order.

A reader yields a `BadRecord` in place of a record that holds no text, and continues after it.
It raises UserError if the rest of the file cannot be read either.
"""

import codecs
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from moe_jax.data.bad_records import BadRecord
from moe_jax.data.columnar import read_arrow, read_parquet
from moe_jax.data.compressed import open_text
from moe_jax.data.long_documents import DocumentLimit, utf8_size
from moe_jax.data.values import NO_VALUE, REPAIR, text_of
from moe_jax.files import json_files

PIECE_CHARACTERS = 8192  # a text corpus of a single file is cut into documents of about this size
BLOCK = 1 << 20  # bytes of a text file that are read at once
MAX_LINE = 4  # bytes of a JSON line per byte of text: letters may be escaped as \\u00e9
BYTE_ORDER_MARK = codecs.BOM_UTF8
# UTF-32's little-endian mark begins with that of UTF-16.
_OTHER_MARKS = {
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF16_BE: "UTF-16",
    codecs.BOM_UTF16_LE: "UTF-16",
}
_EMPTY = BadRecord("is empty", "remove it from the files to train on")

Records = Iterator[str | BadRecord]


def _read_stdlib(path: epath.Path, field: str, key: str, limit: DocumentLimit) -> Records:
    del field, key, limit
    try:
        yield path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return  # a few modules declare another encoding


def _read_text(path: epath.Path, field: str, key: str, limit: DocumentLimit) -> Records:
    del field, key
    blocks, size = [], 0
    for block in _text_blocks(path):
        if isinstance(block, BadRecord):
            yield block
            return
        blocks.append(block)
        size += utf8_size(block)
        if size > limit.max_bytes:
            yield limit.too_long()
            return
    text = "".join(blocks)
    del blocks
    yield limit.check(text) or text


def read_pieces(path: epath.Path, field: str, key: str, limit: DocumentLimit) -> Records:
    """Yield a file cut after line ends, so that a corpus of one file has documents to hold out."""
    del field, key, limit
    for block in _text_blocks(path):
        if isinstance(block, BadRecord):  # checked before any text: the file is the record
            yield block
            return
    text = ""
    for block in _text_blocks(path):
        text, start = f"{text}{block}", 0
        while len(text) - start >= PIECE_CHARACTERS:
            stop = _piece_end(text, start)
            yield text[start:stop]
            start = stop
        text = text[start:]
    start = 0
    while start < len(text):
        stop = _piece_end(text, start)
        yield text[start:stop]
        start = stop


def _piece_end(text: str, start: int) -> int:
    stop = start + PIECE_CHARACTERS
    return text.rfind("\n", start, stop) + 1 or stop


def _text_blocks(path: epath.Path) -> Records:
    """Yield the text of a file block by block; end with a BadRecord if the file is not text."""
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    with open_text(path) as file:
        block = file.read(BLOCK)
        if not block:
            yield _EMPTY
            return
        other = _other_encoding(block)
        if other:
            yield other
            return
        if block.startswith(BYTE_ORDER_MARK):
            block, offset = block.removeprefix(BYTE_ORDER_MARK), len(BYTE_ORDER_MARK)
        while True:
            waiting = len(decoder.getstate()[0])  # bytes of an incomplete character
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                place = offset - waiting + error.start
                yield BadRecord(
                    f"is not UTF-8 at byte offset {place}", "convert it or leave it out"
                )
                return
            if not block:
                return
            offset += len(block)
            block = file.read(BLOCK)


def _read_jsonl(path: epath.Path, field: str, key: str, limit: DocumentLimit) -> Records:
    number, longest = 0, BLOCK + MAX_LINE * limit.max_bytes
    with open_text(path) as lines:
        while line := lines.readline(longest):
            number += 1
            if number == 1:
                other = _other_encoding(line)
                if other:
                    yield other
                    return
                line = line.removeprefix(BYTE_ORDER_MARK)
            if not line.strip():
                continue
            if len(line) == longest and not line.endswith(b"\n"):
                found = limit.too_long()
                while (rest := lines.readline(BLOCK)) and not rest.endswith(b"\n"):
                    pass
            else:
                found = _jsonl_field(line, field, key)
                del line  # it takes as much memory as the text
                found = found if isinstance(found, BadRecord) else limit.check(found) or found
            if isinstance(found, BadRecord):
                found = found._replace(unit="line", number=number)
            yield found
    if not number:
        yield _EMPTY


def _jsonl_field(line: bytes, field: str, key: str) -> str | BadRecord:
    try:
        record = json_files.parse(line)
    except ValueError as error:
        return BadRecord(f"is not JSON ({error})", REPAIR)
    found = text_of(_nested(record, field), field, key)
    try:
        utf8_size(found if isinstance(found, str) else "")
    except UnicodeEncodeError:
        return BadRecord("holds half a surrogate pair, which UTF-8 cannot encode", REPAIR)
    return found


def _nested(record: Any, field: str) -> Any:
    """The value of `field`: a key of the record, or keys of nested objects, joined by dots."""
    if not isinstance(record, dict):
        return NO_VALUE
    if field in record:
        return record[field]
    first, _, rest = field.partition(".")
    return _nested(record.get(first), rest) if rest else NO_VALUE


def _other_encoding(raw: bytes) -> BadRecord | None:
    """The bad record of a file that begins with the byte order mark of another encoding."""
    for mark, name in _OTHER_MARKS.items():
        if raw.startswith(mark):
            return BadRecord(f"is {name}, by its byte order mark", "convert it to UTF-8")
    return None


# Kind -> its reader: called with the file's path, the field, the field's config key and the limit
# to one document.
READERS: dict[str, Callable[[epath.Path, str, str, DocumentLimit], Records]] = {
    "stdlib": _read_stdlib,
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": read_parquet,
    "hf": read_arrow,
}
