"""The texts of a file, by its kind: each reader yields them in order, or says what is wrong."""

import contextlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from etils import epath

from moe_jax.errors import UserError
from moe_jax.files import json_files

PARQUET_ROWS = 1024  # decoded at once: of long documents, 65,536 (the default) take gigabytes
PREFIX_ROWS = 8  # of a column whose texts are stored as what they add to the one before
PIECE_CHARACTERS = 8192  # a text corpus of a single file is cut into documents of about this size
# Text of a compressed file: at most MAX_RATIO times the file's bytes, beyond the first FREE_BYTES.
# zstd and gzip shrink text 3 to 10 times and logs up to 100 times.  One word repeated
# shrinks 30,000 times: a file of some KiB would fill any disk.
MAX_RATIO = 1000
FREE_BYTES = 64 << 20


def _read_stdlib(path: epath.Path, field: str, key: str) -> Iterator[str]:
    del field, key
    try:
        yield path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return  # a few modules declare another encoding


def _read_text(path: epath.Path, field: str, key: str) -> Iterator[str]:
    del field, key
    raw = path.read_bytes()
    if not raw:
        raise UserError(f"{path} is empty: remove it from the files to train on.")
    try:
        yield raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 at byte offset {error.start}: convert it or leave it out."
        ) from None


def read_pieces(path: epath.Path, field: str, key: str) -> Iterator[str]:
    """The file cut after line ends, so that a corpus of one file has documents to hold out."""
    for text in _read_text(path, field, key):
        start = 0
        while start < len(text):
            stop = start + PIECE_CHARACTERS
            stop = text.rfind("\n", start, stop) + 1 or stop
            yield text[start:stop]
            start = stop


def _read_jsonl(path: epath.Path, field: str, key: str) -> Iterator[str]:
    empty = True
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            empty = False
            if line.strip():
                yield _jsonl_field(line, field, key, f"{path} line {number}")
    if empty:
        raise UserError(f"{path} is empty: remove it from the files to train on.")


def _jsonl_field(line: bytes, field: str, key: str, where: str) -> str:
    try:
        record = json_files.parse(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}): fix or remove it.") from None
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        raise UserError(f"{where} has no text in field {field!r}: set {key} to one that has.")
    try:
        record[field].encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where} holds half a surrogate pair, which UTF-8 cannot: fix or remove it."
        ) from None
    return record[field]


def _read_parquet(path: epath.Path, field: str, key: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "Parquet files need pyarrow: install the extra, pip install 'moe_jax[data]'."
        ) from None
    with path.open("rb") as stream:
        with _arrow(f"{path} is not a Parquet file"):
            metadata = pyarrow.parquet.read_metadata(stream)
            schema, declared = metadata.schema.to_arrow_schema(), metadata.num_rows
            columns = schema.names
        if field not in columns:
            raise UserError(
                f"{path} has no column {field!r}: set {key} to one of {', '.join(columns)}."
            )
        if declared == 0:
            raise UserError(f"{path} is empty: remove it from the files to train on.")
        bound, row = _Bound(path), 0
        for group in range(metadata.num_row_groups):
            where = f"{path}, row group {group},"
            with _arrow(f"{where} cannot be read"):
                # Of all columns: looking at one aborts the process where it is damaged (Arrow 26).
                bound.check(metadata.row_group(group).total_byte_size)
                batches = _batches(stream, group, field, schema.field(field).type)
            while True:
                with _arrow(f"{where} cannot be read after row {row}"):
                    batch = next(batches, None)
                if batch is None:
                    break
                for value in batch.column(0):
                    with _arrow(f"{path} row {row} is not UTF-8"):
                        text = value.as_py()
                    if not isinstance(text, str | None):
                        raise UserError(
                            f"{path} row {row}: column {field!r} does not hold text: set {key} to "
                            f"one that does."
                        )
                    bound.add(len(text or ""))
                    yield text or ""
                    row += 1
        if row != declared:
            raise UserError(
                f"{path} holds {row} rows and says that it has {declared}: fix or leave it out."
            )


def _batches(stream: IO[bytes], group: int, field: str, kind: Any) -> Iterator[Any]:
    """A column of one row group, some rows at a time.

    Texts that the file has once stay so in memory, however many rows repeat them.  Arrow does this
    for dictionaries alone (Arrow 26); elsewhere a text may be stored as what it adds to the one
    before, so few rows are read at once.
    """
    import pyarrow
    import pyarrow.parquet

    def read(rows: int, dictionary: list[str] | None) -> Iterator[Any]:
        file = pyarrow.parquet.ParquetFile(
            stream, page_checksum_verification=True, read_dictionary=dictionary
        )
        yield from file.iter_batches(rows, row_groups=[group], columns=[field])

    if kind not in (pyarrow.string(), pyarrow.large_string()):
        yield from read(PARQUET_ROWS, None)
        return
    done = 0
    try:
        for batch in read(PARQUET_ROWS, [field]):
            yield batch
            done += len(batch)
    except OSError:  # "Not yet implemented", as Arrow raises it; what is damaged fails once more
        for batch in read(PREFIX_ROWS, None):
            if done < len(batch):
                yield batch.slice(done)
            done = max(0, done - len(batch))


class _Bound:
    """How far the text of a compressed file may exceed the file."""

    def __init__(self, path: epath.Path):
        self._path, self._size, self._seen = path, path.stat().length, 0

    def add(self, amount: int) -> None:
        """Counts text that came of the file; raises UserError where it is too much."""
        self._seen += amount
        self.check(self._seen)

    def check(self, amount: int) -> None:
        """Raises UserError where the file would make `amount` bytes of text."""
        if amount > FREE_BYTES + MAX_RATIO * self._size:
            raise UserError(
                f"{self._path} expands without bound: its {self._size:,} bytes make more than "
                f"{MAX_RATIO} times as many of text: leave it out, or write it without compression "
                f"if the text is meant to repeat itself so."
            )


@contextlib.contextmanager
def _arrow(what: str) -> Iterator[None]:
    """A damaged file makes Arrow raise errors of many kinds, OSError and ValueError among them."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{what} ({why}): fix or leave it out.") from None


# name of a kind -> the texts of one file of it, given its path, the field and the field's key
READERS: dict[str, Callable[[epath.Path, str, str], Iterator[str]]] = {
    "stdlib": _read_stdlib,
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}
