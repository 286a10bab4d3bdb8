"""Reads the texts of a column: of Parquet, and of Arrow as Hugging Face datasets write it."""

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

PARQUET_ROWS = 1024  # decoded at once: 65,536 long documents (the default) take gigabytes
PREFIX_ROWS = 8  # decoded at once if texts are stored as differences from the text before
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"  # of Arrow's stream format
FILE_MAGIC = b"ARROW1"  # of Arrow's file format, at both ends
EMPTY = BadRecord("is empty", "remove it from the files to train on")


def read_parquet(
    path: epath.Path, field: str, key: str, limit: DocumentLimit
) -> Iterator[str | BadRecord]:
    """Yield the texts of a column of a Parquet file.

    Args:
      path: of the file.
      field: name of the column; inside a struct, names joined by dots.
      key: config key that names the field, for errors.
      limit: to one document.

    Raises:
      UserError: the column is missing or holds no text, or the file is damaged.
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
                # The size of all columns: reading that of a damaged one aborts the process
                # (Arrow 26).
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
                f"{path} holds {row} rows but declares {declared}: fix or leave it out."
            )


def read_arrow(
    path: epath.Path, field: str, key: str, limit: DocumentLimit
) -> Iterator[str | BadRecord]:
    """Yield the texts of a column of an Arrow file; arguments and errors as in `read_parquet`."""
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
            f"{path} is truncated: it ends inside its table. Copy it again or leave it out."
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
    """The names of the column and the fields inside it; raises UserError if they hold no text."""
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
    """Yield the dotted names of all columns, with the fields of structs in place of the structs."""
    for field in schema:
        name = f"{above}{field.name}"
        yield from _columns(field.type, f"{name}.") if _is_struct(field.type) else [name]


def _is_struct(kind: Any) -> bool:
    import pyarrow.types as kinds

    return kinds.is_struct(kind)


def _holds_text(kind: Any) -> bool:
    """True for texts, bytes, lists of these, and nulls."""
    import pyarrow.types as kinds

    if kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_dictionary(kind):
        return _holds_text(kind.value_type)
    text = (kinds.is_string, kinds.is_large_string, kinds.is_string_view, kinds.is_null)
    raw = (kinds.is_binary, kinds.is_large_binary, kinds.is_binary_view, kinds.is_fixed_size_binary)
    return any(is_kind(kind) for is_kind in (*text, *raw))


class _Texts:
    """Reads the texts in the batches of one file."""

    def __init__(
        self, path: epath.Path, field: str, key: str, names: list[str], limit: DocumentLimit
    ):
        self.bound, self._limit = Bound(path), limit
        self._path, self._field, self._key, self._names = path, field, key, names

    def of(self, batch: Any, first: int) -> Iterator[str | BadRecord]:
        """Yield the texts of a batch whose first row is row `first` of the file."""
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
    """Yield batches of a column of one row group.

    A text that the file stores once is in memory once, however many rows repeat it.  Arrow does
    this only for dictionaries (Arrow 26).  In other encodings a text may be stored as its
    difference from the text before and expand when it is read, so PREFIX_ROWS is small.
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
    except OSError:  # Arrow's "Not yet implemented"; a damaged file fails again below
        for batch in read(PREFIX_ROWS, None):
            if done < len(batch):
                yield batch.slice(done)
            done = max(0, done - len(batch))


def _open_arrow(stream: IO[bytes], column: int | None) -> Any:
    """Open a reader of one column (None: of all); a saved dataset has Arrow's stream format."""
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
    count = getattr(reader, "num_record_batches", None)  # only the file format has it
    yield from reader if count is None else (reader.get_batch(i) for i in range(count))


def _check_offsets(batch: Any) -> None:
    """Raise ValueError if values lie outside the file's data; text that is not UTF-8 passes.

    Arrow data is used without decoding, unlike Parquet, so a damaged offset would read arbitrary
    memory.
    """
    try:
        batch.validate(full=True)
    except ValueError as error:
        if "UTF8" not in str(error):
            raise


def _is_whole(stream: IO[bytes]) -> bool:
    """True if a file has Arrow's end mark; readers take a cut between two batches for the end."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - len(STREAM_END)))
    end = stream.read()
    return end == STREAM_END or end.endswith(FILE_MAGIC)


@contextlib.contextmanager
def _arrow(what: str) -> Iterator[None]:
    """Raise UserError for an error of Arrow, which damaged files cause in many kinds."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{what} ({why}): fix or leave it out.") from None
