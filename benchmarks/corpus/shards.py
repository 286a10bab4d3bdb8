"""Writes the rows of each domain to Parquet files whose bytes follow from the rows alone."""

import hashlib
import heapq
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

SHARD_BYTES = 64_000_000  # of text
GROUP_BYTES, GROUP_ROWS = 16_000_000, 1024
COLUMNS = ("text", "domain", "path", "package")
SCHEMA = pyarrow.schema([pyarrow.field(name, pyarrow.string(), nullable=False) for name in COLUMNS])
# Of a domain with a limit: the longest document, so that one file cannot be most of the domain.
LARGEST_SHARE = 0.25


class Row(NamedTuple):
    """A document; its fields are the columns."""

    text: str
    domain: str
    path: str
    package: str  # name=version


class DomainWriter:
    """Writes one domain in the order of `add`; with a limit, only the first rows by SHA-256.

    Args:
      folder: of the shards.
      domain: name of the domain and of its files.
      limit: bytes of text that the domain may have; 0: all.

    Attributes:
      shards: name of a file -> its SHA-256, complete after `close`.
      documents: package (name=version) -> rows written.
      bytes: package -> bytes of text written.
    """

    def __init__(self, folder: Path, domain: str, limit: int = 0):
        self._folder, self._domain, self._limit = folder, domain, limit
        self._kept: list[tuple[int, int, Row]] = []  # a heap with the largest digest first
        self._kept_bytes, self._bound = 0, 1 << 256
        self._rows: list[Row] = []
        self._group_bytes = self._shard_bytes = 0
        self._writer: pyarrow.parquet.ParquetWriter | None = None
        self._path = folder
        self.shards: dict[str, str] = {}
        self.documents: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def add(self, row: Row, size: int, digest: bytes) -> None:
        """Take a row.

        Args:
          row: the document.
          size: of its text in bytes.
          digest: SHA-256 of its text.
        """
        if not self._limit:
            self._write(row, size)
        elif size <= self._limit * LARGEST_SHARE:
            self._keep(row, size, int.from_bytes(digest, "big"))

    def close(self) -> None:
        """Write what is left and complete `shards`."""
        for _, size, row in sorted(self._kept, key=lambda kept: -kept[0]):
            self._write(row, size)
        self._end_shard()

    def _keep(self, row: Row, size: int, number: int) -> None:
        """Hold the longest sequence of the smallest digests whose text fits the limit."""
        if number >= self._bound:
            return
        heapq.heappush(self._kept, (-number, size, row))
        self._kept_bytes += size
        while self._kept_bytes > self._limit:
            largest, dropped, _ = heapq.heappop(self._kept)
            self._kept_bytes -= dropped
            self._bound = -largest

    def _write(self, row: Row, size: int) -> None:
        if self._shard_bytes and self._shard_bytes + size > SHARD_BYTES:
            self._end_shard()
        self._rows.append(row)
        self._group_bytes += size
        self._shard_bytes += size
        self.documents[row.package] += 1
        self.bytes[row.package] += size
        if len(self._rows) == GROUP_ROWS or self._group_bytes >= GROUP_BYTES:
            self._end_group()

    def _end_group(self) -> None:
        if not self._rows:
            return
        writer = self._writer = self._writer or self._open()
        columns = [list(column) for column in zip(*self._rows, strict=True)]
        table = pyarrow.table(columns, schema=SCHEMA)
        writer.write_table(table, row_group_size=len(self._rows))
        self._rows, self._group_bytes = [], 0

    def _open(self) -> pyarrow.parquet.ParquetWriter:
        """Begin the next shard."""
        self._path = self._folder / f"{self._domain}-{len(self.shards):05d}.parquet"
        return pyarrow.parquet.ParquetWriter(
            self._path,
            SCHEMA,
            compression="zstd",
            compression_level=9,
            use_dictionary=["domain", "package"],  # pyright: ignore[reportArgumentType]
            write_statistics=False,
            write_page_checksum=True,
        )

    def _end_shard(self) -> None:
        self._end_group()
        if self._writer is None:
            return
        self._writer.close()
        self._writer, self._shard_bytes = None, 0
        with self._path.open("rb") as stream:
            self.shards[self._path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
