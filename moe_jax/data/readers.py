"""The texts of a file, by its kind: each reader yields them in order, or says what is wrong.

A reader yields a `BadRecord` in the place of a record that holds no text, and goes on after it.
It raises UserError where the rest of the file cannot be read either.
"""

import codecs
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from moe_jax.data.bad_records import BadRecord
from moe_jax.data.columnar import read_arrow, read_parquet
from moe_jax.data.compressed import open_text
from moe_jax.data.values import NO_VALUE, REPAIR, text_of
from moe_jax.files import json_files

PIECE_CHARACTERS = 8192  # a text corpus of a single file is cut into documents of about this size
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


def _read_stdlib(path: epath.Path, field: str, key: str) -> Records:
    del field, key
    try:
        yield path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return  # a few modules declare another encoding


def _read_text(path: epath.Path, field: str, key: str) -> Records:
    del field, key
    with open_text(path) as file:
        raw = file.read()
    if not raw:
        yield _EMPTY
        return
    other = _other_encoding(raw)
    if other:
        yield other
        return
    try:
        yield raw.removeprefix(BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + len(raw) - len(raw.removeprefix(BYTE_ORDER_MARK))
        yield BadRecord(f"is not UTF-8 at byte offset {offset}", "convert it or leave it out")


def read_pieces(path: epath.Path, field: str, key: str) -> Records:
    """The file cut after line ends, so that a corpus of one file has documents to hold out."""
    for text in _read_text(path, field, key):
        if isinstance(text, BadRecord):
            yield text
            continue
        start = 0
        while start < len(text):
            stop = start + PIECE_CHARACTERS
            stop = text.rfind("\n", start, stop) + 1 or stop
            yield text[start:stop]
            start = stop


def _read_jsonl(path: epath.Path, field: str, key: str) -> Records:
    number = 0
    with open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                other = _other_encoding(line)
                if other:
                    yield other
                    return
                line = line.removeprefix(BYTE_ORDER_MARK)
            if line.strip():
                found = _jsonl_field(line, field, key)
                bad = isinstance(found, BadRecord)
                yield found._replace(unit="line", number=number) if bad else found
    if not number:
        yield _EMPTY


def _jsonl_field(line: bytes, field: str, key: str) -> str | BadRecord:
    try:
        record = json_files.parse(line)
    except ValueError as error:
        return BadRecord(f"is not JSON ({error})", REPAIR)
    found = text_of(_nested(record, field), field, key)
    try:
        (found if isinstance(found, str) else "").encode()
    except UnicodeEncodeError:
        return BadRecord("holds half a surrogate pair, which UTF-8 cannot", REPAIR)
    return found


def _nested(record: Any, field: str) -> Any:
    """The value of `field`: a key of the record, or keys of objects within, joined by dots."""
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


# name of a kind -> the texts of one file of it, given its path, the field and the field's key
READERS: dict[str, Callable[[epath.Path, str, str], Records]] = {
    "stdlib": _read_stdlib,
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": read_parquet,
    "hf": read_arrow,
}
