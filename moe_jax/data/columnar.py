"""The texts of a column: of Parquet, and of Arrow as Hugging Face datasets keep it."""

import contextlib
import os
from collections.abc import Iterator
from types import ModuleType
from typing import IO, Any

from etils import epath

from moe_jax.data.bad_records import BadRecord
from moe_jax.data.compressed import Bound
from moe_jax.data.long_documents import DocumentLimit
from moe_jax.data.values import REPAIR, text_of
from moe_jax.errors import UserError

PARQUET_ROWS = 1024  # decoded at once: of long documents, 65,536 (the default) take gigabytes
PREFIX_ROWS = 8  # of a column whose texts are stored as what they add to the one before
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"  # of Arrow's stream format
FILE_MAGIC = b"ARROW1"  # of Arrow's file format, at both ends
EMPTY = BadRecord("is empty", "remove it from the files to train on")


def read_parquet(
    path: epath.Path, field: str, key: str, limit: DocumentLimit
) -> Iterator[str | BadRecord]:
    """The texts of a column of a Parquet file.

    Args:
      path: of the file.
      field: name of the column; below a struct, names joined by dots.
      key: of the config, that names the field.
      limit: to one text.

    Raises:
      UserError: a column that is not there or holds no text, or a file that is damaged.
    """
    parquet = _pyarrow("parquet")
    with path.open("rb") as stream:
        with _arrow(f"{path} is not a Parquet file"):
            metadata = parquet.read_metadata(stream)
            schema, declared = metadata.schema.to_arrow_schema(), metadata.num_rows
        names = _locate(schema, field, path, key)
        if declared == 0:
            yield EMPTY
            return
        leaves = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
        leaf = next(leaf for leaf in leaves if f"{leaf}.".startswith(f"{field}."))
        texts, row = _Texts(path, field, key, names, limit), 0
        for group in range(metadata.num_row_groups):
            where = f"{path}, row group {group},"
            with _arrow(f"{where} cannot be read"):
                # Of all columns: looking at one aborts the process where it is damaged (Arrow 26).
                texts.bound.check(metadata.row_group(group).total_byte_size)
                batches = _batches(stream, group, field, leaf)
            while True:
                with _arrow(f"{where} cannot be read after row {row}"):
                    batch = next(batches, None)
                if batch is None:
                    break
                yield from texts.of(batch, row)
                row += len(batch)
        if row != declared:
            raise UserError(
                f"{path} holds {row} rows and says that it has {declared}: fix or leave it out."
            )


def read_arrow(
    path: epath.Path, field: str, key: str, limit: DocumentLimit
) -> Iterator[str | BadRecord]:
    """The texts of a column of an Arrow file; arguments and errors are those of `read_parquet`."""
    _pyarrow("ipc")
    row = 0
    with path.open("rb") as stream:
        whole = _is_whole(stream)
        with _arrow(f"{path} is not an Arrow file"):
            schema = _open_arrow(stream, None).schema
        names = _locate(schema, field, path, key)
        texts = _Texts(path, field, key, names, limit)
        with _arrow(f"{path} is not an Arrow file"):
            batches = _record_batches(_open_arrow(stream, schema.get_field_index(names[0])))
        while True:
            with _arrow(f"{path} cannot be read after row {row}"):
                batch = next(batches, None)
                if batch is None:
                    break
                _check_offsets(batch)
            yield from texts.of(batch, row)
            row += len(batch)
    if not whole:
        raise UserError(
            f"{path} is cut: it ends in the middle of its table: bring a whole copy or leave it "
            f"out."
        )
    if not row:
        yield EMPTY


def _pyarrow(name: str) -> ModuleType:
    try:
        import pyarrow.compute
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "Parquet files and saved datasets need pyarrow: install the extra, "
            "pip install 'moe_jax[data]'."
        ) from None
    return getattr(pyarrow, name)


def _locate(schema: Any, field: str, path: epath.Path, key: str) -> list[str]:
    """Names of the column and of the fields below it; raises UserError where they hold no text."""
    names = [field] if field in schema.names else field.split(".")
    known, kind = schema.names, None
    for name in names:
        if name not in known:
            columns = ", ".join(_columns(schema))
            raise UserError(f"{path} has no column {field!r}: set {key} to one of {columns}.")
        kind = (kind or schema).field(name).type
        known = [kind.field(i).name for i in range(kind.num_fields)] if _is_struct(kind) else []
    if not _holds_text(kind):
        raise UserError(
            f"{path}: column {field!r} does not hold text ({kind}): set {key} to one that does."
        )
    return names


def _columns(schema: Any, above: str = "") -> Iterator[str]:
    """Every column, and what is below structs by its dotted name."""
    for field in schema:
        name = f"{above}{field.name}"
        yield from _columns(field.type, f"{name}.") if _is_struct(field.type) else [name]


def _is_struct(kind: Any) -> bool:
    import pyarrow.types as kinds

    return kinds.is_struct(kind)


def _holds_text(kind: Any) -> bool:
    """Texts, bytes, lists of them, or nothing but nulls."""
    import pyarrow.types as kinds

    if kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_dictionary(kind):
        return _holds_text(kind.value_type)
    text = (kinds.is_string, kinds.is_large_string, kinds.is_string_view, kinds.is_null)
    raw = (kinds.is_binary, kinds.is_large_binary, kinds.is_binary_view, kinds.is_fixed_size_binary)
    return any(is_kind(kind) for is_kind in (*text, *raw))


class _Texts:
    """The texts in batches of one file."""

    def __init__(
        self, path: epath.Path, field: str, key: str, names: list[str], limit: DocumentLimit
    ):
        self.bound, self._limit = Bound(path), limit
        self._path, self._field, self._key, self._names = path, field, key, names

    def of(self, batch: Any, first: int) -> Iterator[str | BadRecord]:
        """The texts of a batch whose first row is number `first` of the file."""
        compute = _pyarrow("compute")
        with _arrow(f"{self._path} cannot be read after row {first}"):
            column = batch.column(self._names[0])
            for name in self._names[1:]:
                column = compute.struct_field(column, name)  # null where the struct is
        for row, value in enumerate(column, start=first):
            found = self._text(value, row)
            if isinstance(found, str):
                self.bound.add(len(found))
                found = self._limit.check(found) or found
            if isinstance(found, str):
                yield found
            else:
                yield found._replace(unit="row", number=row)

    def _text(self, value: Any, row: int) -> str | BadRecord:
        with _arrow(f"{self._path} row {row} cannot be read"):
            try:
                value = value.as_py()
            except UnicodeDecodeError as error:
                return BadRecord(f"is not UTF-8 ({error})", REPAIR)
        return text_of(value, self._field, self._key)


def _batches(stream: IO[bytes], group: int, field: str, leaf: str) -> Iterator[Any]:
    """A column of one row group, some rows at a time.

    Texts that the file has once stay so in memory, however many rows repeat them.  Arrow does this
    for dictionaries alone (Arrow 26); elsewhere a text may be stored as what it adds to the one
    before: the number of rows that are read at once is small.
    """
    parquet = _pyarrow("parquet")

    def read(rows: int, dictionary: list[str] | None) -> Iterator[Any]:
        file = parquet.ParquetFile(
            stream, page_checksum_verification=True, read_dictionary=dictionary
        )
        yield from file.iter_batches(rows, row_groups=[group], columns=[field])

    done = 0
    try:
        for batch in read(PARQUET_ROWS, [leaf]):
            yield batch
            done += len(batch)
    except OSError:  # "Not yet implemented", as Arrow raises it; what is damaged fails once more
        for batch in read(PREFIX_ROWS, None):
            if done < len(batch):
                yield batch.slice(done)
            done = max(0, done - len(batch))


def _open_arrow(stream: IO[bytes], column: int | None) -> Any:
    """A reader of one column, or of all; a saved dataset is a stream."""
    import pyarrow.ipc

    options = pyarrow.ipc.IpcReadOptions(
        included_fields=None if column is None else [column], use_threads=False
    )
    stream.seek(0)
    is_file = stream.read(len(FILE_MAGIC)) == FILE_MAGIC
    stream.seek(0)
    read = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
    return read(stream, options=options)


def _record_batches(reader: Any) -> Iterator[Any]:
    count = getattr(reader, "num_record_batches", None)  # of the file format
    yield from reader if count is None else (reader.get_batch(i) for i in range(count))


def _check_offsets(batch: Any) -> None:
    """Raises ValueError where values lie outside the file's data; text that is not UTF-8 may stay.

    Parquet is decoded, and Arrow only looked at: a damaged offset would read any memory.
    """
    try:
        batch.validate(full=True)
    except ValueError as error:
        if "UTF8" not in str(error):
            raise


def _is_whole(stream: IO[bytes]) -> bool:
    """Whether a file ends as Arrow ends it; readers take a cut between two batches for the end."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - len(STREAM_END)))
    end = stream.read()
    return end == STREAM_END or end.endswith(FILE_MAGIC)


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
